"""Operators around the Triton kernels, for where :func:`~sltrain_dist.numerics.gpu_kernels.use_kernels` says so.

Operators whose names end in an underscore write to their first argument. torch.compile and FakeTensor support all of
them (without Triton, for FakeTensor). They have no derivatives of their own: the autograd functions of the paths call
them. They take bf16, fp16 and float32; float64 on CUDA uses torch's implementation.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sltrain_dist.sparse_lowrank.sizes import longest_run, run_unit, window_step

_PROGRAMS = 512
"""Number of programs that fill a large GPU. A constant, so that the order of sums does not depend on the device."""
_SCATTER_BLOCK = 512


class Windows(Protocol):
    """The attributes of a BlockSupport that the products need."""

    m: int
    n: int
    k: int
    windows: int
    shift: int
    window_inputs: Tensor


def add_outputs_(
    y: Tensor, x: Tensor, V: Tensor, support: Windows, factor: tuple[Tensor, Tensor] | None, *, add: bool
) -> None:
    """Writes x·Sᵀ + h·Bᵀ for the support `blocks` to y, or adds it.

    All matrices have contiguous rows, which may be some elements apart.

    Args:
        y: (T, m); its content is used only if `add`.
        x: (T, n).
        V: (m, k), contiguous; cast to the type of x tile by tile, as B is.
        support: The positions of V.
        factor: h (T, r) and B (m, r); None for S alone.
        add: Whether to add to y.
    """
    h, B = (None, None) if factor is None else (factor[0], factor[1].contiguous())
    blocks_outputs_(y, x, V.contiguous(), support.window_inputs, support.shift, h, B, add)


def add_inputs_(
    dx: Tensor, g: Tensor, V: Tensor, support: Windows, factor: tuple[Tensor, Tensor] | None, *, add: bool
) -> None:
    """Writes g·S + q·A for the support `blocks` to dx, or adds it.

    Args:
        dx: (T, n); its content is used only if `add`.
        g: (T, m), the gradient of y.
        V: (m, k), contiguous; cast to the type of g tile by tile, as A is.
        support: The positions of V.
        factor: q (T, r) and A (r, n); None for S alone.
        add: Whether to add to dx.
    """
    q, A = factor or (None, None)
    blocks_inputs_(dx, g, V.contiguous(), support.window_inputs, support.shift, q, A, add)


def sum_values(g: Tensor, x: Tensor, support: Windows) -> Tensor:
    """Returns gᵀx at the positions of the support `blocks`, the gradient of V: (m, k), float32.

    Args:
        g: (T, m).
        x: (T, n).
        support: The positions.
    """
    return blocks_values(g, x, support.window_inputs, support.shift, support.k)


def _kernels() -> ModuleType:
    from sltrain_dist.sparse_lowrank.kernels import triton_kernels  # not at the top: Triton may not be installed

    return triton_kernels


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tile(size: int, limit: int) -> int:
    return max(16, min(limit, 1 << (size - 1).bit_length()))


def _tiles(x: Tensor, features: int, summed: int) -> tuple[int, int, int]:
    """Returns the tile of a result (T, features) that is summed over so many features."""
    # float32 is computed without tensor cores by default, where larger tiles run out of registers.
    limits = (64, 32, 32) if x.dtype == torch.float32 else (128, 128, 64)
    return _tile(x.shape[0], limits[0]), _tile(features, limits[1]), _tile(summed, limits[2])


@torch.library.custom_op("sltrain::blocks_outputs_", mutates_args=("y",))
def blocks_outputs_(
    y: Tensor,
    x: Tensor,
    V: Tensor,
    window_inputs: Tensor,
    shift: int,
    h: Tensor | None,
    B: Tensor | None,
    add: bool,
) -> None:
    """See :func:`add_outputs_`."""
    m, k = V.shape
    if not y.numel():
        return
    windows, rank = window_inputs.numel() // k, 0 if B is None else B.shape[1]
    block_t, block_o, block_k = _tiles(x, m, max(k, rank))
    with torch.cuda.device_of(x):
        _kernels().outputs_kernel[(_cdiv(len(x), block_t) * _cdiv(m, block_o),)](
            x, V, window_inputs, x if h is None else h, V if B is None else B, y, len(x), m, windows, shift,
            PITCH_X=x.stride(0), PITCH_H=0 if h is None else h.stride(0), PITCH_Y=y.stride(0),
            K=k, RANK=rank, ADD=add, GROUP=window_step(x.shape[1], k), UNIT=run_unit(m, windows),
            PRECISION=_precision(), BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_K=block_k,
        )  # fmt: skip


@torch.library.custom_op("sltrain::blocks_inputs_", mutates_args=("dx",))
def blocks_inputs_(
    dx: Tensor,
    g: Tensor,
    V: Tensor,
    window_inputs: Tensor,
    shift: int,
    q: Tensor | None,
    A: Tensor | None,
    add: bool,
) -> None:
    """See :func:`add_inputs_`."""
    (m, k), n = V.shape, dx.shape[1]
    if not dx.numel():
        return
    windows, rank = window_inputs.numel() // k, 0 if A is None else A.shape[0]
    unit = run_unit(m, windows)
    block_t, block_c, block_k = _tiles(g, n, max(_cdiv(m, windows), rank))
    with torch.cuda.device_of(g):
        _kernels().inputs_kernel[(_cdiv(len(g), block_t) * _cdiv(n, block_c),)](
            g, V, window_inputs, g if q is None else q, V if A is None else A, dx, len(g), m, n, windows, shift,
            PITCH_G=g.stride(0), PITCH_Q=0 if q is None else q.stride(0), PITCH_A=0 if A is None else A.stride(0),
            PITCH_X=dx.stride(0), K=k, RANK=rank, ADD=add, GROUP=window_step(n, k), UNIT=unit,
            PRECISION=_precision(), BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_K=block_k,
        )  # fmt: skip


@torch.library.custom_op("sltrain::blocks_values", mutates_args=())
def blocks_values(g: Tensor, x: Tensor, window_inputs: Tensor, shift: int, k: int) -> Tensor:
    """See :func:`sum_values`; summed over the tokens of each chunk, then over the chunks."""
    tokens, m = g.shape
    if tokens == 0:
        return g.new_zeros(m, k, dtype=torch.float32)
    windows = window_inputs.numel() // k
    plan = values_plan(tokens, m, k, windows, g.dtype)
    partial = g.new_empty(plan.chunks, m, k, dtype=torch.float32)
    with torch.cuda.device_of(g):
        _kernels().values_kernel[(plan.tiles * plan.chunks,)](
            g, x, window_inputs, partial, tokens, plan.chunk, m, windows, shift,
            PITCH_G=g.stride(0), PITCH_X=x.stride(0),
            R=plan.run, K=k, GROUP=window_step(x.shape[1], k), UNIT=run_unit(m, windows), PRECISION=_precision(),
            BLOCK_T=plan.block[0], BLOCK_R=plan.block[1], BLOCK_K=plan.block[2],
        )  # fmt: skip
    return partial.view(m, k) if plan.chunks == 1 else partial.sum(0)


@blocks_values.register_fake
def _(g: Tensor, x: Tensor, window_inputs: Tensor, shift: int, k: int) -> Tensor:
    return g.new_empty(g.shape[1], k, dtype=torch.float32)


class ValuesPlan(NamedTuple):
    """How gradients of V are summed: the longest run, the tile of (tokens, outputs, slots), tiles, and chunks.

    Each of the `chunks` of `chunk` tokens has a sum (m, k) of its own in float32.
    """

    run: int
    block: tuple[int, int, int]
    tiles: int
    chunk: int
    chunks: int


def values_plan(tokens: int, m: int, k: int, windows: int, dtype: torch.dtype) -> ValuesPlan:
    """Returns how gradients of V are summed over T > 0 tokens.

    As many chunks as fill a GPU, of at least 256 tokens, and of whole tiles.
    """
    run = longest_run(m, windows)
    limits = (32, 64, 64) if dtype == torch.float32 else (64, 128, 64)
    block = _tile(tokens, limits[0]), _tile(run, limits[1]), _tile(k, limits[2])
    tiles = _cdiv(run, block[1]) * _cdiv(k, block[2]) * windows
    wanted = max(1, min(_PROGRAMS // tiles, tokens // 256))
    chunk = _cdiv(_cdiv(tokens, wanted), block[0]) * block[0]
    return ValuesPlan(run, block, tiles, chunk, _cdiv(tokens, chunk))


@torch.library.custom_op("sltrain::stratified_add_", mutates_args=("W",))
def stratified_add_(W: Tensor, V: Tensor, key: Tensor, first: int) -> None:
    """Adds the values of a StratifiedSupport to rows of W, in place.

    Args:
        W: (rows, n), contiguous: rows first … first + rows − 1 of the weight.
        V: (rows, k), contiguous; cast to W's type.
        key: The support's 32-bit key, as one int64 on the device.
        first: Number of the first row.
    """
    _launch_stratified(W, V, key, first, scatter=True)


@torch.library.custom_op("sltrain::stratified_take", mutates_args=())
def stratified_take(G: Tensor, k: int, key: Tensor, first: int) -> Tensor:
    """Returns the entries of rows of a matrix at the positions of a StratifiedSupport, (rows, k).

    Args:
        G: (rows, n), contiguous: rows first … first + rows − 1 of an (m, n) matrix.
        k: Number of values in a row.
        key: The support's 32-bit key, as one int64 on the device.
        first: Number of the first row.
    """
    values = G.new_empty(G.shape[0], k)
    _launch_stratified(G, values, key, first, scatter=False)
    return values


@stratified_take.register_fake
def _(G: Tensor, k: int, key: Tensor, first: int) -> Tensor:
    return G.new_empty(G.shape[0], k)


def _launch_stratified(matrix: Tensor, values: Tensor, key: Tensor, first: int, *, scatter: bool) -> None:
    count = values.numel()
    if not count:
        return
    with torch.cuda.device_of(matrix):
        _kernels().stratified_kernel[(_cdiv(count, _SCATTER_BLOCK),)](
            matrix, values, key, first, count, matrix.shape[1], values.shape[1],
            SCATTER=scatter, BLOCK=_SCATTER_BLOCK,
        )  # fmt: skip
