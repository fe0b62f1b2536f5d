"""Sizes of the sparse part (no torch), shared by the operator, the parameter counts and the planner."""

from __future__ import annotations

import itertools
import math

from sltrain_dist.config.schema import SupportKind

SLICE = 512
"""Most tokens at a time in products with scattered positions, for 2-byte types; wider types take fewer (cache size)."""
TOKEN_ALIGNMENT = 16
"""The Triton kernels pad tokens of transposed matrices to a multiple of this, which Triton recognises as aligned."""
ROW_ALIGNMENT = 16
"""Elements of which a row of an aligned matrix is a multiple. cuBLAS multiplies 2-byte matrices whose rows do not begin
at multiples of 16 bytes five to seven times as slowly (docs/reports/2026-11-27-h200.md). With 16 elements, rows begin
at sectors of a GPU's memory, too."""
FUSED_RANK = 256
"""Largest rank at which a kernel for `blocks` always computes the low-rank product, too: see :func:`is_fused`."""
BLOCK_SLICE = 512
"""Tokens that gradients of V are summed over at a time, with `blocks` on the CPU and 4- or 8-byte types: longer sums in
one product are slower there."""

_ALIGNMENT = 8
"""The values per row of `blocks` are a multiple of this, so that its small matrix products are aligned."""
_ALIGN_FROM = 256
"""Smallest in_features for which they are; in narrower layers, steps of eight values would be too coarse."""


def nonzeros(m: int, n: int, density: float, support: SupportKind = "random") -> int:
    """Returns the number of sparse values of an (m, n) layer.

    random: int(δ·m·n), as in the paper and its reference code. Others: m times :func:`values_per_row`.
    """
    if support == "random":
        return int(density * m * n)
    return m * values_per_row(n, density, support)


def values_per_row(n: int, density: float, support: SupportKind) -> int:
    """Returns k, the number of sparse values in each row of a support that has equally many in every row.

    stratified: δn, rounded, at least 1. blocks: δn rounded to a multiple of 8 (at least 8, at most n) where n ≥ 256, so
    that the actual density k/n may differ from δ; in narrower layers, as stratified.

    Raises:
        ValueError: The support is random, whose rows have different numbers of values.
    """
    if support == "random":
        raise ValueError("support = random has no fixed number of values per row; use stratified or blocks")
    if support == "blocks" and n >= _ALIGN_FROM:
        return min(n, max(_ALIGNMENT, _ALIGNMENT * math.floor(density * n / _ALIGNMENT + 0.5)))
    return max(1, math.floor(density * n + 0.5))


def values_shape(m: int, n: int, density: float, support: SupportKind) -> tuple[int, ...]:
    """Returns the shape of V: (nnz,) for random, (m, k) for the other supports."""
    if support == "random":
        return (nonzeros(m, n, density),)
    return (m, values_per_row(n, density, support))


def effective_density(m: int, n: int, density: float, support: SupportKind) -> float:
    """Returns the actual density: the share of W's entries that S holds."""
    return nonzeros(m, n, density, support) / (m * n)


def position_bytes(m: int, n: int) -> int:
    """Returns the bytes of one flat position i·n + c: int32 while all fit, int64 beyond."""
    return 4 if m * n < 2**31 else 8


def column_bytes(n: int) -> int:
    """Returns the bytes of one stored column: int16 while all fit, int32 beyond."""
    return 2 if n <= 2**15 else 4


def stored_index_bytes(m: int, n: int, density: float, support: SupportKind) -> int:
    """Returns the bytes of the indices that a layer keeps in memory.

    random: every column, and the number of values in each row, int32. stratified: none. blocks: the permutation of the
    inputs and its inverse, int32.
    """
    if support == "random":
        return column_bytes(n) * nonzeros(m, n, density) + 4 * m
    if support == "stratified":
        return 0
    k = values_per_row(n, density, support)
    return 8 * num_windows(n, k) * k  # w·k window inputs, n first places and w·k − n second places


def is_fused(m: int, rank: int, bits: int) -> bool:
    """Returns whether, on a GPU, one kernel computes the outputs of `blocks`, with the low-rank product in it.

    The outputs are then written once, but the kernel reaches less of the matrix rate than a library's product. By the
    cost model, the two take equally long at a rank of about :data:`FUSED_RANK`. A library's product is much slower
    where rows of outputs are not aligned, and float32 leaves no time to gain, because its products take longer.

    Args:
        m: Number of outputs.
        rank: r.
        bits: Bits of the type that is computed in.
    """
    return bits <= 16 and (rank <= FUSED_RANK or not rows_are_aligned(m, bits))


def rows_are_aligned(columns: int, bits: int) -> bool:
    """Returns whether the rows of a contiguous matrix begin at multiples of 16 bytes, or need not on a GPU."""
    return bits > 16 or columns * bits % 128 == 0


def stratum_start(j: int, n: int, k: int) -> int:
    """Returns the first column of stratum j of k: ⌊j·n/k⌋ (stratum k would start at n)."""
    return j * n // k


def num_windows(n: int, k: int) -> int:
    """Returns w = ⌈n/k⌉, the number of windows of k permuted inputs each that cover n inputs."""
    return -(-n // k)


def window_starts(n: int, k: int) -> list[int]:
    """Returns the first permuted input of every window: ⌈i(n−k)/(w−1)⌉, spread evenly; the last window ends at n."""
    w = num_windows(n, k)
    return [-(-i * (n - k) // (w - 1)) for i in range(w)] if w > 1 else [0]


def first_output(run: int, m: int, w: int) -> int:
    """Returns the first output of a run: m outputs form w runs, of which the first m mod w are longer by one."""
    each, longer = divmod(m, w)
    return run * each + min(run, longer)


def window_runs(m: int, w: int, shift: int) -> list[tuple[slice, slice, int]]:
    """Returns the runs of outputs, equal ones together: (their windows, all their outputs, outputs per run).

    Run j, of ⌊m/w⌋ or ⌊m/w⌋ + 1 neighbouring outputs, uses window (j + shift) mod w. If there are fewer outputs than
    windows, runs without an output are omitted.
    """
    bounds = sorted({0, m % w, w - shift, w})
    runs = []
    for first, last in itertools.pairwise(bounds):
        rows = slice(first_output(first, m, w), first_output(last, m, w))
        if rows.stop > rows.start:
            window = (first + shift) % w
            runs.append((slice(window, window + last - first), rows, (rows.stop - rows.start) // (last - first)))
    return runs
