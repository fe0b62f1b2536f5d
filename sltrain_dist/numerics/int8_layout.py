"""The layout of int8 weights (no torch): which values share a scale, and the bytes of codes and scales."""

from __future__ import annotations

import math

INT8_GROUP = 256
"""Number of values of a vector that share a scale, counted from its beginning. In a matrix, every row has one scale."""


def scale_count(shape: tuple[int, ...]) -> int:
    """Returns the number of scales: one per row of a matrix, one per :data:`INT8_GROUP` values of a vector."""
    return shape[0] if len(shape) > 1 else -(-shape[0] // INT8_GROUP)


def int8_bytes(shape: tuple[int, ...]) -> int:
    """Returns the bytes of a weight of this shape: one per code, and four per scale."""
    return math.prod(shape) + 4 * scale_count(shape)
