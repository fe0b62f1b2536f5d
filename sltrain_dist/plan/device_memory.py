"""Parses the memory of a device, given as a size or as the name of a GPU (no torch)."""

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
"""MiB of each GPU as `nvidia-smi` reports it (memory.total), with error correction on if that is the default."""

_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|tensor core|generation|graphics|\b(gpu|rtx|pcie|sxm\d*|hbm\d*e?)\b")
"""Words in nvidia-smi's names that do not tell GPUs with different memory apart."""

_UNITS = {"b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= dict.fromkeys((_letter, f"{_letter}b"), 1000**_power)
    _UNITS |= dict.fromkeys((f"{_letter}i", f"{_letter}ib"), 1024**_power)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)

_MIN_BARE_BYTES = 10**8
"""Smallest number without a unit that is taken as bytes: in a larger unit, no device has so much memory."""

_MAX_BYTES = 2**48
"""Sizes from here on are refused: 256 TiB is more than any device has, and less than "4060 Ti" read as a size."""

_ROUNDING = 0.05
"""Relative difference up to which a size after a GPU's name ("RTX 3090 24GB") agrees with the GPU's memory."""

_FORMS = (
    "Sizes are 24GiB, 80GB or bytes, with their unit (24564MiB, 80G as 80GB, 25769803776B); "
    f"GPUs are {', '.join(GPUS)}, and their names in nvidia-smi"
)


def parse_device_memory(text: str) -> int:
    """Returns the bytes of a device from a size or the name of a GPU.

    Args:
        text: A size such as "24GiB", "80GB", "80G" (the same as 80GB) or "24564 MiB", or the name of a GPU as
            nvidia-smi prints it ("NVIDIA H100 80GB HBM3") or shorter as long as it is unambiguous ("H100", "3090 Ti").

    Raises:
        ConfigError: The text is neither, or a number without a unit that is too small to be in bytes.
    """
    mib = None if text.strip().isdecimal() else _gpu_mib(text)
    if mib is not None:  # tried before sizes, because "3090 Ti" could be one
        return mib * MIB
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in {"", *_UNITS}:
        raise ConfigError(f"--device-memory {text!r} is neither a size nor a known GPU{_did_you_mean(text)} {_FORMS}")
    if not match[2] and 0 < float(match[1]) < _MIN_BARE_BYTES:
        meant = _did_you_mean(text).removesuffix(".")
        raise ConfigError(f"--device-memory {text}: of which unit? Write {match[1]}GiB, {match[1]}GB or so{meant}")
    size = float(match[1]) * _UNITS.get(match[2].lower(), 1)
    if not 1 <= size < _MAX_BYTES:
        raise ConfigError(f"--device-memory {text!r} is not the size of a device{_did_you_mean(text)} {_FORMS}")
    return int(size)


def _gpu_mib(text: str) -> int | None:
    """Returns the MiB of a GPU by its name, which may end with the right size ("RTX 3090 24GB"); None if unknown."""
    gpus = {_plain(name): mib for name, mib in GPUS.items()}
    plain = _plain(text)
    if plain in gpus:
        return gpus[plain]
    for name, mib in gpus.items():
        said = re.fullmatch(r"(\d+)g", plain.removeprefix(name)) if plain.startswith(name) else None
        if said and any(abs(int(said[1]) * unit / (mib * MIB) - 1) < _ROUNDING for unit in (10**9, 2**30)):
            return mib
    return None


def _did_you_mean(text: str) -> str:
    """Returns "; did you mean …?" with the GPUs whose names begin like the text or are spelled like it, or "."."""
    plain, gpus = _plain(text), {_plain(name): name for name in GPUS}
    names = [name for key, name in gpus.items() if key.startswith(plain)] if len(plain) > 2 else []
    if not names and re.search("[a-z]", text.lower()):
        names = [gpus[key] for key in difflib.get_close_matches(plain, gpus, n=1)]
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else "."


def _plain(name: str) -> str:
    """Reduces a GPU's name to what is the same in all its spellings: "a10080g" for "NVIDIA A100-SXM4-80GB"."""
    words = _NOISE.sub(" ", re.sub(r"[^a-z0-9]+", " ", name.lower()))
    plain = re.sub(r"(\d)gi?b$", r"\1g", words.replace(" ", ""))
    return plain.replace("rtx", "")
