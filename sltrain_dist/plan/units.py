"""Device memory as people write it (no torch): a size, or a GPU by the name that nvidia-smi gives it."""

from __future__ import annotations

import difflib
import re

from sltrain_dist.errors import ConfigError

MIB = 2**20

GPUS: dict[str, int] = {
    "T4": 15360,
    "P100-16G": 16384,
    "V100-16G": 16384,
    "V100-32G": 32768,
    "A2": 15356,
    "A10": 23028,
    "A10G": 23028,
    "A16": 15356,
    "A30": 24576,
    "A40": 46068,
    "A100-40G": 40960,
    "A100-80G": 81920,
    "A800-80G": 81920,
    "L4": 23034,
    "L40": 46068,
    "L40S": 46068,
    "H20": 97871,
    "H100": 81559,
    "H100 NVL": 95830,
    "H800": 81559,
    "H200": 143771,
    "H200 NVL": 143771,
    "GH200-480G": 97871,
    "B200": 183359,
    "RTX 2080 Ti": 11264,
    "RTX 3060": 12288,
    "RTX 3080": 10240,
    "RTX 3080 Ti": 12288,
    "RTX 3090": 24576,
    "RTX 3090 Ti": 24564,
    "RTX 4060": 8188,
    "RTX 4070": 12282,
    "RTX 4070 Ti": 12282,
    "RTX 4080": 16376,
    "RTX 4090": 24564,
    "RTX 4090 Laptop": 16376,
    "RTX 5070": 12227,
    "RTX 5070 Ti": 16303,
    "RTX 5080": 16303,
    "RTX 5090": 32607,
    "RTX A4000": 16376,
    "RTX A5000": 24564,
    "RTX A6000": 49140,
    "RTX 5000 Ada": 32760,
    "RTX 6000 Ada": 49140,
    "TITAN RTX": 24576,
}
"""MiB of each GPU, as `nvidia-smi` states them (memory.total), with error correction where it is the default."""

_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|tensor core|generation|graphics|\b(gpu|rtx|pcie|sxm\d*|hbm\d*e?)\b")
"""Words of nvidia-smi's names that do not tell how much memory there is."""

_UNITS = {"b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= dict.fromkeys((_letter, f"{_letter}b"), 1000**_power)
    _UNITS |= dict.fromkeys((f"{_letter}i", f"{_letter}ib"), 1024**_power)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)

_ONLY_BYTES = 10**8
"""A bare number from here on can only be meant in bytes: of any larger unit, no device has as many."""

_NO_DEVICE = 2**48
"""Bytes that no device has: 256 TiB, less than the "4060 Ti" of a graphics card's name."""

_SAME_SIZE = 0.05
"""Relative difference up to which two sizes are the same one, differently rounded."""

_FORMS = (
    "Sizes are 24GiB, 80GB or bytes, with their unit (24564MiB, 80G as 80GB, 25769803776B); "
    f"GPUs are {', '.join(GPUS)}, and their names in nvidia-smi"
)


def parse_device_memory(text: str) -> int:
    """Bytes of a device: "24GiB", "80GB", "80G" (as 80GB), "24564 MiB", or a GPU's name, such as "RTX 4090".

    Names are those of nvidia-smi ("NVIDIA H100 80GB HBM3"), or as short as they are not ambiguous ("H100", "3090 Ti").

    Raises:
        ConfigError: It is none of these, or a number without a unit that is too small to be in bytes.
    """
    mib = None if text.strip().isdecimal() else _gpu_mib(text)
    if mib is not None:  # before sizes, of which "3090 Ti" could be one
        return mib * MIB
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in {"", *_UNITS}:
        raise ConfigError(f"--device-memory {text!r} is no size and no known GPU{_meant(text)} {_FORMS}")
    if not match[2] and 0 < float(match[1]) < _ONLY_BYTES:
        meant = _meant(text).removesuffix(".")
        raise ConfigError(f"--device-memory {text}: of which unit? Write {match[1]}GiB, {match[1]}GB or so{meant}")
    size = float(match[1]) * _UNITS.get(match[2].lower(), 1)
    if not 1 <= size < _NO_DEVICE:
        raise ConfigError(f"--device-memory {text!r} is not the size of a device{_meant(text)} {_FORMS}")
    return int(size)


def _gpu_mib(text: str) -> int | None:
    """MiB of a GPU by its name; a size after it must be the one that the name has anyway ("RTX 3090 24GB")."""
    gpus = {_plain(name): mib for name, mib in GPUS.items()}
    plain = _plain(text)
    if plain in gpus:
        return gpus[plain]
    for name, mib in gpus.items():
        said = re.fullmatch(r"(\d+)g", plain.removeprefix(name)) if plain.startswith(name) else None
        if said and any(abs(int(said[1]) * unit / (mib * MIB) - 1) < _SAME_SIZE for unit in (10**9, 2**30)):
            return mib
    return None


def _meant(text: str) -> str:
    """GPUs that were perhaps meant: the sizes of one that was named, such as A100; else what is spelled like it."""
    plain, gpus = _plain(text), {_plain(name): name for name in GPUS}
    names = [name for known, name in gpus.items() if known.startswith(plain)] if len(plain) > 2 else []
    if not names and re.search("[a-z]", text.lower()):
        names = [gpus[known] for known in difflib.get_close_matches(plain, gpus, n=1)]
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else "."


def _plain(name: str) -> str:
    """A GPU's name reduced to what tells its memory, alike for all spellings: "a10080g"."""
    words = _NOISE.sub(" ", re.sub(r"[^a-z0-9]+", " ", name.lower()))
    plain = re.sub(r"(\d)gi?b$", r"\1g", words.replace(" ", ""))
    return plain.replace("rtx", "")
