"""Sizes of the sparse part (no torch): what the operator, the parameter counts and the planner agree on."""

from __future__ import annotations


def nonzeros(m: int, n: int, density: float) -> int:
    """Sparse values of an (m, n) layer: int(δ·m·n), as in the paper and its reference code."""
    return int(density * m * n)


def index_bytes_per_value(m: int, n: int) -> int:
    """Bytes of one stored flat position: int32 while every position i·n + c fits, int64 beyond."""
    return 4 if m * n < 2**31 else 8
