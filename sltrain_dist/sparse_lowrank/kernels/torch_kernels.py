"""Operators around the Triton kernels, for where :func:`~sltrain_dist.numerics.gpu_kernels.use_kernels` says so.

All operators but the in-place scatter are functional. torch.compile and FakeTensor support them (without Triton, for
FakeTensor). They have no derivatives of their own: the autograd functions of the paths call them. They take bf16, fp16
and float32; float64 on CUDA uses torch's implementation.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sltrain_dist.sparse_lowrank.sizes import TOKEN_ALIGNMENT

_PROGRAMS = 512
"""Number of programs that fill a large GPU. A constant, so that the order of sums does not depend on the device."""
_TRANSPOSE_BLOCK = 64
_SCATTER_BLOCK = 512


def _kernels() -> ModuleType:
    from sltrain_dist.sparse_lowrank.kernels import triton_kernels  # not at the top: Triton may not be installed

    return triton_kernels


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tile(size: int, limit: int) -> int:
    """Returns a power of two from 16 to `limit`, also a power of two, that covers `size` in few tiles.

    The largest, unless half of it covers the size with much less padding.
    """
    tile = max(16, min(limit, 1 << (size - 1).bit_length()))
    if tile < 128 or 4 * _cdiv(size, tile) * tile <= 5 * _cdiv(size, tile // 2) * tile // 2:
        return tile
    return tile // 2


def outputs_tile(tokens: int, m: int, k: int, rank: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the tile of :func:`blocks_outputs` in tokens, outputs, and features that are summed over."""
    # float32 is computed without tensor cores by default, where larger tiles run out of registers.
    limits = (64, 32, 32) if dtype == torch.float32 else (128, 128, 64)
    return _tile(tokens, limits[0]), _tile(m, limits[1]), _tile(max(k, rank), limits[2])


def inputs_tile(tokens: int, m: int, k: int, windows: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the tile of :func:`blocks_inputs` in tokens, outputs that are summed over, and inputs of a window."""
    limits = (64, 32, 32) if dtype == torch.float32 else (128, 64, 128)
    return _tile(tokens, limits[0]), _tile(longest_load(m, windows), limits[1]), _tile(k, limits[2])


class ValuesPlan(NamedTuple):
    """How :func:`blocks_values` sums: the tile in tokens, outputs and inputs of a window, the tiles, and the chunks.

    Each of the `chunks` of `chunk` tokens has a sum (m, k) of its own in float32.
    """

    tile: tuple[int, int, int]
    tiles: int
    chunk: int
    chunks: int


def values_plan(tokens: int, m: int, k: int, windows: int, dtype: torch.dtype) -> ValuesPlan:
    """Returns how gradients of V are summed over T > 0 tokens.

    As many chunks as fill a GPU, of at least 256 tokens, and of whole tiles.
    """
    stride, run = padded_tokens(tokens), longest_load(m, windows)
    limits = (32, 64, 64) if dtype == torch.float32 else (64, 128, 64)
    tile = _tile(stride, limits[0]), _tile(run, limits[1]), _tile(k, limits[2])
    tiles = _cdiv(run, tile[1]) * _cdiv(k, tile[2]) * windows
    wanted = max(1, min(_PROGRAMS // tiles, stride // 256))
    chunk = _cdiv(_cdiv(stride, wanted), tile[0]) * tile[0]
    return ValuesPlan(tile, tiles, chunk, _cdiv(stride, chunk))


def longest_load(m: int, windows: int) -> int:
    """Returns the most outputs between the multiple of 8 in front of a run and the run's end."""
    run = _cdiv(m, windows)
    return run if m % windows == 0 and run % 8 == 0 else run + 7


def padded_tokens(tokens: int) -> int:
    """Returns T', the tokens of transposed matrices: T, padded to a multiple of 16."""
    return _cdiv(tokens, TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT


@torch.library.custom_op("sltrain::transpose", mutates_args=())
def transpose(x: Tensor) -> Tensor:
    """Transposes a matrix whose rows are tokens, and pads the tokens with zeros to a multiple of 16.

    Args:
        x: (T, features), with contiguous rows; bf16, fp16 or fp32, like all matrices here.

    Returns:
        (features, T').
    """
    tokens, features = x.shape
    out = x.new_empty(features, padded_tokens(tokens))
    if out.numel():
        grid = (_cdiv(out.shape[1], _TRANSPOSE_BLOCK) * _cdiv(features, _TRANSPOSE_BLOCK),)
        with torch.cuda.device_of(x):
            _kernels().transpose_kernel[grid](
                x, out, tokens, features, x.stride(0), out.shape[1], BLOCK=_TRANSPOSE_BLOCK
            )
    return out


@transpose.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], padded_tokens(x.shape[0]))


@torch.library.custom_op("sltrain::restore_inputs", mutates_args=())
def restore_inputs(source: Tensor, base: Tensor, places: Tensor, k: int) -> Tensor:
    """Transposes inputs back from the order of the windows, and adds them to a matrix.

    Args:
        source: (w·k, T'), contiguous, such as of :func:`blocks_inputs`.
        base: (T, n), with contiguous rows: what to add to.
        places: (n,) int32, the `input_places` of a BlockSupport; an input that lies in two windows becomes their sum.
        k: Number of inputs of a window.

    Returns:
        (T, n), new and contiguous.
    """
    (rows, stride), (tokens, features) = source.shape, base.shape
    out = source.new_empty(tokens, features)
    if out.numel():
        grid = (_cdiv(tokens, _TRANSPOSE_BLOCK) * _cdiv(features, _TRANSPOSE_BLOCK),)
        with torch.cuda.device_of(source):
            _kernels().restore_kernel[grid](
                source, places, base, out, tokens, features, base.stride(0), stride, rows // k,
                K=k, TWICE=rows > features, BLOCK=_TRANSPOSE_BLOCK,
            )  # fmt: skip
    return out


@restore_inputs.register_fake
def _(source: Tensor, base: Tensor, places: Tensor, k: int) -> Tensor:
    return source.new_empty(base.shape)


@torch.library.custom_op("sltrain::blocks_outputs", mutates_args=())
def blocks_outputs(
    inputs: Tensor, V: Tensor, window_inputs: Tensor, shift: int, tokens: int, h: Tensor | None, B: Tensor | None
) -> Tensor:
    """Computes x·Sᵀ + h·Bᵀ for the support `blocks`.

    Args:
        inputs: xᵀ, (n, T'), from :func:`transpose`.
        V: (m, k), contiguous; cast to the type of the inputs tile by tile, as B is.
        window_inputs: (w·k,) int32, of the BlockSupport.
        shift: Of the BlockSupport.
        tokens: T.
        h: (T, r), with contiguous rows; or None, as B, for x·Sᵀ alone.
        B: (m, r), contiguous.

    Returns:
        (T, m).
    """
    (m, k), stride, rank = V.shape, inputs.shape[1], 0 if B is None else B.shape[1]
    windows = window_inputs.numel() // k
    out = inputs.new_empty(tokens, m)
    if out.numel():
        block_t, block_o, block_k = outputs_tile(tokens, m, k, rank, inputs.dtype)
        with torch.cuda.device_of(inputs):
            _kernels().outputs_kernel[(_cdiv(m, block_o) * _cdiv(tokens, block_t),)](
                inputs, V, window_inputs, inputs if h is None else h, V if B is None else B, out,
                tokens, stride, m, windows, shift,
                PITCH_H=0 if h is None else h.stride(0), K=k, RANK=rank, PRECISION=_precision(),
                BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_K=block_k,
            )  # fmt: skip
    return out


@blocks_outputs.register_fake
def _(
    inputs: Tensor, V: Tensor, window_inputs: Tensor, shift: int, tokens: int, h: Tensor | None, B: Tensor | None
) -> Tensor:
    return inputs.new_empty(tokens, V.shape[0])


@torch.library.custom_op("sltrain::blocks_inputs", mutates_args=())
def blocks_inputs(g: Tensor, V: Tensor, windows: int, shift: int, base: Tensor | None) -> Tensor:
    """Computes (g·S)ᵀ for the support `blocks`, in the order of its windows: for :func:`restore_inputs`.

    Args:
        g: (T, m), contiguous; or (T, columns) with zeros behind the first m columns.
        V: (m, k), contiguous; cast to the type of the gradients tile by tile.
        windows: w.
        shift: Of the BlockSupport.
        base: A tensor to add, such as the result of another call, or None.

    Returns:
        (w·k, T').
    """
    (m, k), (tokens, columns) = V.shape, g.shape
    stride = padded_tokens(tokens)
    out = g.new_empty(windows * k, stride)
    if out.numel():
        block_t, block_r, block_k = inputs_tile(tokens, m, k, windows, g.dtype)
        with torch.cuda.device_of(g):
            _kernels().inputs_kernel[(_cdiv(k, block_k) * windows * _cdiv(stride, block_t),)](
                g, V, out if base is None else base, out, tokens, stride, m, windows, shift,
                PITCH=columns, K=k, ADD=base is not None, PRECISION=_precision(),
                BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_K=block_k,
            )  # fmt: skip
    return out


@blocks_inputs.register_fake
def _(g: Tensor, V: Tensor, windows: int, shift: int, base: Tensor | None) -> Tensor:
    return g.new_empty(windows * V.shape[1], padded_tokens(g.shape[0]))


@torch.library.custom_op("sltrain::blocks_values", mutates_args=())
def blocks_values(g: Tensor, inputs: Tensor, window_inputs: Tensor, shift: int, m: int, k: int) -> Tensor:
    """Computes gᵀx at the positions of the support `blocks`: the gradient of V.

    Args:
        g: (T, m), contiguous; or (T, columns) with zeros behind the first m columns.
        inputs: xᵀ, (n, T'), from :func:`transpose`.
        window_inputs: (w·k,) int32, of the BlockSupport.
        shift: Of the BlockSupport.
        m: Number of outputs.
        k: Number of values in a row.

    Returns:
        (m, k), float32, summed over the tokens of each chunk, then over the chunks.
    """
    (tokens, columns), stride, windows = g.shape, inputs.shape[1], window_inputs.numel() // k
    if tokens == 0:
        return g.new_zeros(m, k, dtype=torch.float32)
    (block_t, block_r, block_k), tiles, chunk, chunks = values_plan(tokens, m, k, windows, g.dtype)
    partial = g.new_empty(chunks, m, k, dtype=torch.float32)
    with torch.cuda.device_of(g):
        _kernels().values_kernel[(tiles * chunks,)](
            g, inputs, window_inputs, partial, tokens, stride, chunk, m, windows, shift,
            PITCH=columns, R=longest_load(m, windows), K=k, PRECISION=_precision(),
            BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_K=block_k,
        )  # fmt: skip
    return partial.view(m, k) if chunks == 1 else partial.sum(0)


@blocks_values.register_fake
def _(g: Tensor, inputs: Tensor, window_inputs: Tensor, shift: int, m: int, k: int) -> Tensor:
    return g.new_empty(m, k, dtype=torch.float32)


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
