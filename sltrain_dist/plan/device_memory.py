"""Parses the memory of a device, given as a size or as the name of a GPU (no torch)."""

from __future__ import annotations

import csv
import difflib
import math
import re
from pathlib import Path

from sltrain_dist.errors import ConfigError

MIB = 2**20

with Path(__file__).with_name("gpus.csv").open(encoding="utf-8", newline="") as _file:
    GPUS = {row["name"]: int(row["MiB"]) for row in csv.DictReader(_file)}
"""MiB of each GPU as `nvidia-smi` reports it (memory.total), with error correction on if that is the default."""

_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|tensor core|generation|graphics|\b(gpu|rtx|pcie|sxm\d*|hbm\d*e?)\b")
"""Words in nvidia-smi's names that do not tell GPUs with different memory apart."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?(b?)", re.IGNORECASE)
"""A number, the letter of its unit's power, "i" if that is a power of 1024, and the unit's "B"."""

_MIN_BARE_BYTES = 10**8
"""Smallest number without a unit that is taken as bytes: in a larger unit, no device has so much memory."""

_MAX_BYTES = 2**48
"""Smallest size that is refused: 256 TiB is more than any device has, and less than "4060 Ti" read as a size."""

_ROUNDING = 0.05
"""Relative difference up to which a size after a GPU's name ("RTX 3090 24GB") agrees with the GPU's memory."""

_FORMS = (
    "Sizes are 24GiB, 80GB or bytes, with their unit (24564MiB, 80G as 80GB, 25769803776B); "
    f"GPUs are {', '.join(GPUS)}, and their names in nvidia-smi"
)


def parse_device_memory(text: str) -> int:
    """Returns the bytes of a device from a size or the name of a GPU.

    Sizes are such as "24GiB", "80GB", "80G" (the same as 80GB) or "24564 MiB". The name of a GPU is as nvidia-smi
    prints it ("NVIDIA H100 80GB HBM3"), or shorter as long as it is unambiguous ("H100", "3090 Ti").

    Raises:
        ConfigError: The text is neither, or a number without a unit that is too small to be in bytes.
    """
    mib = None if text.strip().isdecimal() else _gpu_mib(text)
    if mib is not None:  # tried before sizes, because "3090 Ti" could be one
        return mib * MIB
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--device-memory {text!r} is neither a size nor a known GPU{_did_you_mean(text)} {_FORMS}")
    number, letter, binary, byte = match.groups()
    if not (letter or byte) and 0 < float(number) < _MIN_BARE_BYTES:
        meant = _did_you_mean(text).removesuffix(".")
        raise ConfigError(f"--device-memory {text} has no unit; write {number}GiB or {number}GB{meant}")
    power = " kmgt".index(letter.lower()) if letter else 0
    size = float(number) * (1024 if binary else 1000) ** power
    if not 1 <= size < _MAX_BYTES:
        raise ConfigError(f"--device-memory {text!r} is not the size of a device{_did_you_mean(text)} {_FORMS}")
    return int(size)


def _gpu_mib(text: str) -> int | None:
    """Returns the MiB of a GPU by its name, which may end with the right size ("RTX 3090 24GB"); None if unknown."""
    plain = _plain(text)
    for name, mib in GPUS.items():
        if plain.startswith(_plain(name)):
            rest = plain.removeprefix(_plain(name))
            gigabytes = int(rest[:-1]) if re.fullmatch(r"\d+g", rest) else 0
            if not rest or any(math.isclose(gigabytes * g, mib * MIB, rel_tol=_ROUNDING) for g in (10**9, 2**30)):
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
