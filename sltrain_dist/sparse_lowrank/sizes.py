"""Sizes of the sparse part (no torch): what the operator, the parameter counts and the planner agree on."""

from __future__ import annotations

import itertools
import math

from sltrain_dist.config.schema import SupportKind

_ALIGNMENT = 8
"""Values per row of `blocks` are a multiple of this, so that its small matrix products start aligned."""
_ALIGN_FROM = 256
"""Narrower layers are not rounded: eight values would be too coarse a step of the density."""


def nonzeros(m: int, n: int, density: float, support: SupportKind = "random") -> int:
    """Sparse values of an (m, n) layer.

    random: int(δ·m·n), as in the paper and its reference code. Else m rows of :func:`values_per_row`.
    """
    if support == "random":
        return int(density * m * n)
    return m * values_per_row(n, density, support)


def values_per_row(n: int, density: float, support: SupportKind) -> int:
    """k, the sparse values in each row of the supports that have equally many in every row.

    stratified: δn, rounded, at least 1. blocks: δn rounded to a multiple of 8 (at least 8, at most n) where
    n ≥ 256, so that the density it really has, k/n, may differ from δ; like stratified below.

    Raises:
        ValueError: The support is random, whose rows differ.
    """
    if support == "random":
        raise ValueError("the rows of support = random differ in their number of values")
    if support == "blocks" and n >= _ALIGN_FROM:
        return min(n, max(_ALIGNMENT, _ALIGNMENT * math.floor(density * n / _ALIGNMENT + 0.5)))
    return max(1, math.floor(density * n + 0.5))


def values_shape(m: int, n: int, density: float, support: SupportKind) -> tuple[int, ...]:
    """Shape of V: (nnz,) for random, (m, k) else."""
    if support == "random":
        return (nonzeros(m, n, density),)
    return (m, values_per_row(n, density, support))


def effective_density(m: int, n: int, density: float, support: SupportKind) -> float:
    """The share of W's entries that S really holds."""
    return nonzeros(m, n, density, support) / (m * n)


def position_bytes(m: int, n: int) -> int:
    """Bytes of one flat position i·n + c: int32 while all fit, int64 beyond."""
    return 4 if m * n < 2**31 else 8


def column_bytes(n: int) -> int:
    """Bytes of one stored column: int16 while all fit, int32 beyond."""
    return 2 if n <= 2**15 else 4


def stored_index_bytes(m: int, n: int, density: float, support: SupportKind) -> int:
    """Bytes that a layer keeps in memory to know its positions.

    random: every column, and the values of each row, int32. stratified: none. blocks: the permutation of the inputs
    and its inverse, int32.
    """
    if support == "random":
        return column_bytes(n) * nonzeros(m, n, density) + 4 * m
    if support == "stratified":
        return 0
    k = values_per_row(n, density, support)
    return 8 * num_windows(n, k) * k  # w·k in windows, n first and w·k − n second places


def stratum_start(j: int, n: int, k: int) -> int:
    """First column of stratum j of k: ⌊j·n/k⌋ (so that stratum k would start at n)."""
    return j * n // k


def num_windows(n: int, k: int) -> int:
    """w = ⌈n/k⌉, the windows of k permuted inputs each that cover n inputs."""
    return -(-n // k)


def window_starts(n: int, k: int) -> list[int]:
    """First permuted input of every window: ⌈i(n−k)/(w−1)⌉, spread evenly, the last one ending at n."""
    w = num_windows(n, k)
    return [-(-i * (n - k) // (w - 1)) for i in range(w)] if w > 1 else [0]


def first_output(run: int, m: int, w: int) -> int:
    """First output of a run: m outputs make w runs, the first m mod w of them longer by one."""
    each, longer = divmod(m, w)
    return run * each + min(run, longer)


def window_runs(m: int, w: int, shift: int) -> list[tuple[slice, slice, int]]:
    """Runs of outputs that are alike: (their windows, all their outputs, outputs of each).

    Run j, of ⌊m/w⌋ or ⌊m/w⌋ + 1 neighbouring outputs, uses window (j + shift) mod w. Runs without an output, where
    there are fewer than windows, are left out.
    """
    bounds = sorted({0, m % w, w - shift, w})
    runs = []
    for first, last in itertools.pairwise(bounds):
        rows = slice(first_output(first, m, w), first_output(last, m, w))
        if rows.stop > rows.start:
            window = (first + shift) % w
            runs.append((slice(window, window + last - first), rows, (rows.stop - rows.start) // (last - first)))
    return runs
