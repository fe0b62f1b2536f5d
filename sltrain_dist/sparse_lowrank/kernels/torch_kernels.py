"""Operators around the Triton kernels, for where :func:`~sltrain_dist.numerics.gpu_kernels.use_kernels` says so.

All operators but the in-place scatter are functional. torch.compile and FakeTensor support them (without Triton, for
FakeTensor). They have no derivatives of their own: the autograd functions of the paths call them. They take bf16, fp16
and float32; float64 on CUDA uses torch's implementation.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from sltrain_dist.sparse_lowrank.sizes import TOKEN_ALIGNMENT

Weights = tuple[Tensor, ...]
"""The same as `Weights` in supports/support.py, which this module cannot import: supports import it."""

_PROGRAMS = 512
"""Number of programs that fill a large GPU. A constant, so that the order of sums does not depend on the device."""
_TRANSPOSE_BLOCK = 64
_SCATTER_BLOCK = 512


class Windows(Protocol):
    """The attributes of a BlockSupport that the products need."""

    k: int
    windows: int
    shift: int
    window_inputs: Tensor
    input_places: Tensor


class BlockProducts:
    """Products with the S of a BlockSupport by the Triton kernels, in place of the support's own.

    Arranged matrices are transposed, (features, T'), where T' is T padded to a multiple of 16.

    Args:
        support: The positions.
        tokens: T.
    """

    def __init__(self, support: Windows, tokens: int) -> None:
        self.support, self.tokens = support, tokens

    keeps_arranged = False

    def step(self, x: Tensor) -> int:
        return max(1, self.tokens)

    def weights(self, V: Tensor) -> Weights:
        return (V.contiguous(),)

    def transposed_weights(self, V: Tensor) -> Weights:
        return (V.contiguous(),)

    def places(self) -> Weights:
        return ()

    def arrange_inputs(self, x: Tensor) -> Tensor:
        return transpose(x.contiguous())

    def arrange_outputs(self, g: Tensor) -> Tensor:
        return transpose(g.contiguous())

    def restore_inputs(self, arranged: Tensor, out: Tensor | None = None) -> Tensor:
        x = transpose_back(arranged, self.tokens, self.support.input_places, self.support.k)
        return x if out is None else out.copy_(x)

    def sum_over_tokens(self, q: Tensor, inputs: Tensor) -> Tensor:
        return torch.mm(inputs[:, : self.tokens], q).t()

    def multiply(self, weights: Weights, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        s = self.support
        y = blocks_outputs(inputs, weights[0], s.window_inputs, s.shift)
        y = transpose_back(y, self.tokens, None, s.k)
        return y if out is None else out.copy_(y)

    def multiply_transposed(self, weights: Weights, outputs: Tensor, total: Tensor | None = None) -> Tensor:
        s = self.support
        return blocks_inputs(outputs, weights[0], s.windows, s.shift, total)

    def sample(self, places: Weights, outputs: Tensor, inputs: Tensor, total: Tensor | None = None) -> Tensor:
        s = self.support
        dV = blocks_values(outputs, inputs, s.window_inputs, s.shift, s.k)
        return dV if total is None else total.add_(dV)

    def sampled(self, total: Tensor) -> Tensor:
        return total


def _kernels() -> ModuleType:
    from sltrain_dist.sparse_lowrank.kernels import triton_kernels  # not at the top: Triton may not be installed

    return triton_kernels


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tile_limits(dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the largest tiles: in tokens, in features of the result, and in features that are summed over."""
    # float32 is computed without tensor cores by default, where larger tiles run out of registers.
    return (64, 32, 32) if dtype == torch.float32 else (128, 64, 64)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tile(size: int, limit: int) -> int:
    return max(16, min(limit, 1 << (size - 1).bit_length()))


def _padded(tokens: int) -> int:
    return -(-tokens // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT


@torch.library.custom_op("sltrain::transpose", mutates_args=())
def transpose(x: Tensor) -> Tensor:
    """Transposes a matrix whose rows are tokens, and pads the tokens with zeros to a multiple of 16.

    Args:
        x: (T, features), contiguous; bf16, fp16 or fp32, like all matrices here.

    Returns:
        (features, T').
    """
    tokens, features = x.shape
    out = x.new_empty(features, _padded(tokens))
    if out.numel():
        grid = (_cdiv(out.shape[1], _TRANSPOSE_BLOCK) * _cdiv(features, _TRANSPOSE_BLOCK),)
        with torch.cuda.device_of(x):
            _kernels().transpose_kernel[grid](x, out, tokens, features, out.shape[1], BLOCK=_TRANSPOSE_BLOCK)
    return out


@transpose.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], _padded(x.shape[0]))


@torch.library.custom_op("sltrain::transpose_back", mutates_args=())
def transpose_back(source: Tensor, tokens: int, places: Tensor | None, k: int) -> Tensor:
    """Inverts :func:`transpose`; with places, also restores the order of the inputs from that of the windows.

    Args:
        source: (features, T'), or with places (w·k, T'); contiguous.
        tokens: T.
        places: (n,) int32, the `input_places` of a BlockSupport; an input that lies in two windows becomes their sum.
        k: Number of inputs of a window.

    Returns:
        (T, features), or with places (T, n).
    """
    rows, stride = source.shape
    features = rows if places is None else places.numel()
    out = source.new_empty(tokens, features)
    if out.numel():
        grid = (_cdiv(tokens, _TRANSPOSE_BLOCK) * _cdiv(features, _TRANSPOSE_BLOCK),)
        with torch.cuda.device_of(source):
            _kernels().transpose_back_kernel[grid](
                source, source if places is None else places, out, tokens, features, stride, rows // k,
                K=k, GATHER=places is not None, TWICE=rows > features, BLOCK=_TRANSPOSE_BLOCK,
            )  # fmt: skip
    return out


@transpose_back.register_fake
def _(source: Tensor, tokens: int, places: Tensor | None, k: int) -> Tensor:
    return source.new_empty(tokens, source.shape[0] if places is None else places.numel())


@torch.library.custom_op("sltrain::blocks_outputs", mutates_args=())
def blocks_outputs(inputs: Tensor, V: Tensor, window_inputs: Tensor, shift: int) -> Tensor:
    """Computes S·xᵀ for the support `blocks`.

    Args:
        inputs: xᵀ, (n, T'), from :func:`transpose`.
        V: (m, k), contiguous; cast to the type of the inputs tile by tile.
        window_inputs: (w·k,) int32, of the BlockSupport.
        shift: Of the BlockSupport.

    Returns:
        (m, T').
    """
    (m, k), stride = V.shape, inputs.shape[1]
    windows = window_inputs.numel() // k
    rows = _cdiv(m, windows)
    out = inputs.new_empty(m, stride)
    if out.numel():
        t, result, summed = _tile_limits(inputs.dtype)
        block_t, block_r = _tile(stride, t), _tile(rows, result)
        with torch.cuda.device_of(inputs):
            _kernels().outputs_kernel[(_cdiv(rows, block_r) * _cdiv(stride, block_t) * windows,)](
                inputs, V, window_inputs, out, stride, m, windows, shift,
                R=rows, K=k, PRECISION=_precision(), BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_K=_tile(k, summed),
            )  # fmt: skip
    return out


@blocks_outputs.register_fake
def _(inputs: Tensor, V: Tensor, window_inputs: Tensor, shift: int) -> Tensor:
    return inputs.new_empty(V.shape[0], inputs.shape[1])


@torch.library.custom_op("sltrain::blocks_inputs", mutates_args=())
def blocks_inputs(grads: Tensor, V: Tensor, windows: int, shift: int, base: Tensor | None) -> Tensor:
    """Computes Sᵀ·gᵀ for the support `blocks`, in the order of its windows: for :func:`transpose_back` with places.

    Args:
        grads: gᵀ, (m, T'), from :func:`transpose`.
        V: (m, k), contiguous; cast to the type of the gradients tile by tile.
        windows: w.
        shift: Of the BlockSupport.
        base: A tensor to add, such as the result of another call, or None.

    Returns:
        (w·k, T').
    """
    (m, k), stride = V.shape, grads.shape[1]
    rows = _cdiv(m, windows)
    out = grads.new_empty(windows * k, stride)
    if out.numel():
        t, result, summed = _tile_limits(grads.dtype)
        block_t, block_k = _tile(stride, t), _tile(k, result)
        with torch.cuda.device_of(grads):
            _kernels().inputs_kernel[(_cdiv(k, block_k) * _cdiv(stride, block_t) * windows,)](
                grads, V, out if base is None else base, out, stride, m, windows, shift,
                R=rows, K=k, ADD=base is not None, PRECISION=_precision(),
                BLOCK_T=block_t, BLOCK_R=_tile(rows, summed), BLOCK_K=block_k,
            )  # fmt: skip
    return out


@blocks_inputs.register_fake
def _(grads: Tensor, V: Tensor, windows: int, shift: int, base: Tensor | None) -> Tensor:
    return grads.new_empty(windows * V.shape[1], grads.shape[1])


@torch.library.custom_op("sltrain::blocks_values", mutates_args=())
def blocks_values(grads: Tensor, inputs: Tensor, window_inputs: Tensor, shift: int, k: int) -> Tensor:
    """Computes gᵀx at the positions of the support `blocks`: the gradient of V.

    Args:
        grads: gᵀ, (m, T'), from :func:`transpose`.
        inputs: xᵀ, (n, T'), from :func:`transpose`.
        window_inputs: (w·k,) int32, of the BlockSupport.
        shift: Of the BlockSupport.
        k: Number of values in a row.

    Returns:
        (m, k), float32, summed over the tokens of each chunk, then over the chunks.
    """
    m, stride = grads.shape
    windows = window_inputs.numel() // k
    rows = _cdiv(m, windows)
    if stride == 0:
        return grads.new_zeros(m, k, dtype=torch.float32)
    most = 32 if grads.dtype == torch.float32 else 64  # as in _tile_limits
    block_t, block_r, block_k = _tile(stride, most), _tile(rows, 64), _tile(k, 64)
    tiles = _cdiv(rows, block_r) * _cdiv(k, block_k) * windows
    # As many chunks as fill the device, of at least 256 tokens, and of whole tiles.
    wanted = max(1, min(_PROGRAMS // tiles, stride // 256))
    chunk = _cdiv(_cdiv(stride, wanted), block_t) * block_t
    chunks = _cdiv(stride, chunk)
    partial = grads.new_empty(chunks, m, k, dtype=torch.float32)
    with torch.cuda.device_of(grads):
        _kernels().values_kernel[(tiles * chunks,)](
            grads, inputs, window_inputs, partial, stride, chunk, m, windows, shift,
            R=rows, K=k, PRECISION=_precision(), BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_K=block_k,
        )  # fmt: skip
    return partial.view(m, k) if chunks == 1 else partial.sum(0)


@blocks_values.register_fake
def _(grads: Tensor, inputs: Tensor, window_inputs: Tensor, shift: int, k: int) -> Tensor:
    return grads.new_empty(grads.shape[0], k, dtype=torch.float32)


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
