"""Parts of the path `factored` for the support `blocks` on a GPU, by the Triton kernels.

Inputs are transposed, once for all layers. Outputs and their gradients stay tokens × features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sltrain_dist.numerics.gpu_kernels import use_kernels
from sltrain_dist.sparse_lowrank.kernels.torch_kernels import (
    blocks_inputs,
    blocks_outputs,
    blocks_values,
    restore_inputs,
    transpose,
)
from sltrain_dist.sparse_lowrank.sizes import ROW_ALIGNMENT, is_fused, rows_are_aligned
from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport
from sltrain_dist.sparse_lowrank.supports.support import Support


def runs_on_gpu(x: Tensor, supports: Sequence[Support]) -> bool:
    """Returns whether the functions here are used for an input x of layers with these supports."""
    return use_kernels(x) and all(isinstance(support, BlockSupport) for support in supports)


def align_rows(matrix: Tensor) -> Tensor:
    """Returns a contiguous matrix whose rows, in 2-byte types, begin at multiples of 16 bytes.

    It is the given one if that will do; else a copy, which may have more columns, that are zero. See
    :data:`~sltrain_dist.sparse_lowrank.sizes.ROW_ALIGNMENT`.
    """
    rows, columns = matrix.shape
    if rows_are_aligned(columns, 8 * matrix.dtype.itemsize):
        return matrix.contiguous()
    aligned = _new_aligned(matrix, rows, columns)
    aligned[:, :columns].copy_(matrix)
    aligned[:, columns:].zero_()
    return aligned


def _new_aligned(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left·right in aligned rows, as a view without the added columns."""
    rows, columns = left.shape[0], right.shape[1]
    if rows_are_aligned(columns, 8 * left.dtype.itemsize) or torch.compiler.is_compiling():
        return torch.mm(left, right)  # Inductor aligns products itself, and does not trace one into a view
    return torch.mm(left, right, out=_new_aligned(left, rows, columns)[:, :columns])


def sum_over_tokens(q: Tensor, x: Tensor) -> Tensor:
    """Returns qᵀx, (r, n), contiguous, for q (T, r) and x (T, n)."""
    return _product(q.t(), x).contiguous()


def layer_outputs(
    x: Tensor, h: Sequence[Tensor], Bs: Sequence[Tensor], Vs: Sequence[Tensor], supports: Sequence[Support]
) -> tuple[Tensor, ...]:
    """Returns hBᵀ + xSᵀ of every layer, (T, m).

    Args:
        x: (T, n).
        h: s·xAᵀ of each layer, (T, r).
        Bs: B of each layer, (m, r).
        Vs: V of each layer.
        supports: Support of each layer.
    """
    outputs, inputs, tokens = [], transpose(x), x.shape[0]
    for h_i, B, V, support in zip(h, Bs, Vs, supports, strict=True):
        assert isinstance(support, BlockSupport)
        sparse = (inputs, V.contiguous(), support.window_inputs, support.shift, tokens)
        if is_fused(support.m, B.shape[1], 8 * x.dtype.itemsize):
            outputs.append(blocks_outputs(*sparse, h_i, B.contiguous()))
        else:
            outputs.append(blocks_outputs(*sparse, None, None).addmm_(h_i, B.to(x.dtype).t()))
    return tuple(outputs)


def input_gradient(
    q: Tensor, A: Tensor, grads: Sequence[Tensor], Vs: Sequence[Tensor], supports: Sequence[Support]
) -> Tensor:
    """Returns dx = Σ (qA + gS) over the layers, (T, n).

    Args:
        q: s·gB of all layers side by side, (T, Σr).
        A: A of all layers, one below the other, (Σr, n).
        grads: g of each layer, as of :func:`align_rows`.
        Vs: V of each layer.
        supports: Support of each layer.
    """
    dx: Tensor | None = None
    total: Tensor | None = None
    for i, (g, V, support) in enumerate(zip(grads, Vs, supports, strict=True)):
        assert isinstance(support, BlockSupport)
        total = blocks_inputs(g, V.contiguous(), support.windows, support.shift, total)
        if i + 1 == len(supports) or not support.shares_inputs(supports[i + 1]):
            # qA only now: fewer tensors of x's size at once than if it were formed first.
            dx = restore_inputs(total, _product(q, A) if dx is None else dx, support.input_places, support.k)
            total = None
    assert dx is not None
    return dx


def value_gradients(x: Tensor, grads: Sequence[Tensor], supports: Sequence[Support]) -> list[Tensor | None]:
    """Returns dV of each layer, (m, k) in float32, for x (T, n) and g of each layer as of :func:`align_rows`."""
    gradients: list[Tensor | None] = []
    inputs = transpose(x)
    for g, support in zip(grads, supports, strict=True):
        assert isinstance(support, BlockSupport)
        gradients.append(blocks_values(g, inputs, support.window_inputs, support.shift, support.m, support.k))
    return gradients
