"""What int8 weights take (no torch): which values share a scale, and the bytes of codes and scales."""

from __future__ import annotations

import math

INT8_BLOCK = 256
"""Values of a vector that share a scale, counted from its beginning. In a matrix every row has one."""


def scale_count(shape: tuple[int, ...]) -> int:
    """Scales of a weight: one a row of a matrix, one for every :data:`INT8_BLOCK` values of a vector."""
    return shape[0] if len(shape) > 1 else -(-shape[0] // INT8_BLOCK)


def int8_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a weight of this shape: a code a value, and the float32 scales."""
    return math.prod(shape) + 4 * scale_count(shape)
