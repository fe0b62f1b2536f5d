"""Sizes of the sparse part (no torch), shared by the operator, the parameter counts and the planner."""

from __future__ import annotations

import itertools
import math

from sltrain_dist.config.schema import SupportKind

SLICE = 512
"""Most tokens at a time in products with scattered positions, for 2-byte types; wider types take fewer (cache size)."""
ROW_ALIGNMENT = 16
"""On a GPU, rows of the matrices of a factored layer begin at multiples of so many elements: cuBLAS multiplies bf16
matrices whose rows are not aligned five to seven times as slowly (docs/reports/2026-11-27-h200.md)."""
FUSED_RANK = 512
"""Largest rank at which a kernel for `blocks` computes the low-rank product, too. It then need not read and write the
result once more, but it reaches less of a GPU's matrix rate than a library's product. By the roofline the two take
equally long at a rank of about 800; not measured."""
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


def stratum_start(j: int, n: int, k: int) -> int:
    """Returns the first column of stratum j of k: ⌊j·n/k⌋ (stratum k would start at n)."""
    return j * n // k


def num_windows(n: int, k: int) -> int:
    """Returns w = ⌈n/k⌉, the number of windows of k permuted inputs each that cover n inputs."""
    return -(-n // k)


def input_group(n: int, k: int) -> int:
    """Returns the number of neighbouring inputs that the permutation of `blocks` keeps together.

    The largest power of two that divides k and is at most 16, k/8 and k²/n. 16 values of 2 bytes are a sector of a
    GPU's memory. The outputs of a run are neighbours and depend on the same k inputs of their layer, so a window of k/g
    groups in the next layer reaches k²/g inputs of this one: with g ≤ k²/n it can reach all n.
    """
    most = min(16, k // 8, k * k // n)
    return math.gcd(k, 1 << max(0, most.bit_length() - 1))


def window_starts(n: int, k: int) -> list[int]:
    """Returns the first permuted input of every window: spread evenly; the last window ends at n.

    Window i of w starts at g·⌈i(n−k)/(w−1)g⌉, where g is :func:`input_group`, or 1 if that does not divide n.
    """
    w, g = num_windows(n, k), window_step(n, k)
    return [g * -(-i * ((n - k) // g) // (w - 1)) for i in range(w)] if w > 1 else [0]


def window_step(n: int, k: int) -> int:
    """Returns a number of which all windows' starts are multiples: :func:`input_group`, or 1 if that does not divide n.

    If it is the group, a window consists of whole groups.
    """
    group = input_group(n, k)
    return group if n % group == 0 else 1


def run_unit(m: int, w: int) -> int:
    """Returns a number of which all runs' lengths are multiples, but for the last: 64 or 16, or 1 if runs are short.

    Tiles of a GPU's matrix products then seldom lie in two runs.
    """
    return next((unit for unit in (64, 16) if m % (unit * w) == 0 or m >= 2 * unit * w), 1)


def first_output(run: int, m: int, w: int) -> int:
    """Returns the first output of a run: of ⌈m/u⌉ units of u outputs, w runs take equally many, the first one more."""
    unit = run_unit(m, w)
    each, longer = divmod(-(-m // unit), w)
    return min(m, unit * (run * each + min(run, longer)))


def longest_run(m: int, w: int) -> int:
    """Returns the number of outputs of the longest of w runs."""
    return first_output(1, m, w)


def window_runs(m: int, w: int, shift: int) -> list[tuple[slice, slice, int]]:
    """Returns the runs of outputs, equal ones together: (their windows, all their outputs, outputs per run).

    Run j uses window (j + shift) mod w. Runs differ by one :func:`run_unit`; the last may be shorter. If there are
    fewer outputs than windows, runs without an output are omitted.
    """
    unit = run_unit(m, w)
    shorter_last = {w - 1} if m % unit else set()
    bounds = sorted({0, -(-m // unit) % w, w - shift, w} | shorter_last)
    runs = []
    for first, last in itertools.pairwise(bounds):
        rows = slice(first_output(first, m, w), first_output(last, m, w))
        if rows.stop > rows.start:
            window = (first + shift) % w
            runs.append((slice(window, window + last - first), rows, (rows.stop - rows.start) // (last - first)))
    return runs
