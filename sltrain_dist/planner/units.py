"""Sizes as people write and read them (no torch): device memory by size or by name, and bytes in words."""

from __future__ import annotations

import difflib
import re

from sltrain_dist.errors import ConfigError

GIB = 2**30

GPUS: dict[str, float] = {
    "T4": 14.56,
    "L4": 22.03,
    "A10": 22.06,
    "L40S": 44.39,
    "RTX 3090": 23.52,
    "RTX 4090": 23.52,
    "RTX 5090": 31.36,
    "RTX A6000": 47.40,
    "V100-16G": 15.77,
    "V100-32G": 31.73,
    "A100-40G": 39.38,
    "A100-80G": 79.10,
    "H100": 79.10,
    "H100-80G": 79.10,
    "H200": 139.72,
    "B200": 178.35,
}
"""GiB that torch can have, by GPU: a little less than the name says, because the driver keeps some. The "total
capacity" of torch's own out-of-memory messages; where drivers differ, the least that we know of."""

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_device_memory(text: str) -> int:
    """Bytes of a device: "24GiB", "80GB", a number of bytes, or a GPU's name such as "RTX 4090" (also rtx4090).

    Raises:
        ConfigError: It is none of these.
    """
    gpus = {_plain(name): gib for name, gib in GPUS.items()}
    gib = gpus.get(_plain(text))
    if gib is not None:
        return int(gib * GIB)
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        # Sizes of what was named, such as A100; else what is spelled like it.
        begins = [plain for plain in gpus if _plain(text) and plain.startswith(_plain(text))]
        close = begins or difflib.get_close_matches(_plain(text), gpus, n=1)
        names = " or ".join(repr(name) for name in GPUS if _plain(name) in close)
        meant = f"; did you mean {names}?" if names else "."
        raise ConfigError(
            f"--device-memory {text!r} is no size and no known GPU{meant} Sizes are 24GiB, 80GB or bytes; "
            f"GPUs are {', '.join(GPUS)}"
        )
    size = int(float(match[1]) * unit)
    if size <= 0:
        raise ConfigError(f"--device-memory {text!r} must be above zero; sizes are 24GiB, 80GB or bytes")
    return size


def _plain(name: str) -> str:
    """A GPU's name without its maker, spaces, hyphens and the B of GB: what its spellings share."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("geforce", ""))
    return re.sub(r"(\d+)gb$", r"\1g", plain)
