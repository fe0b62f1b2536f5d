"""The path `factored` for the support `blocks` on a GPU, by the Triton kernels: matrices stay tokens × features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sltrain_dist.numerics.gpu_kernels import use_kernels
from sltrain_dist.sparse_lowrank.kernels.torch_kernels import add_inputs_, add_outputs_, sum_values
from sltrain_dist.sparse_lowrank.sizes import FUSED_RANK, ROW_ALIGNMENT
from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport
from sltrain_dist.sparse_lowrank.supports.support import Support


def runs_on_gpu(x: Tensor, supports: Sequence[Support]) -> bool:
    """Returns whether the functions here are used for an input x of layers with these supports."""
    return use_kernels(x) and all(isinstance(support, BlockSupport) for support in supports)


def aligned_rows(matrix: Tensor) -> Tensor:
    """Returns a matrix whose rows are contiguous and, in 2-byte types, begin at multiples of 16 bytes.

    It is the given one if that will do; else a copy, with gaps between its rows, see
    :data:`~sltrain_dist.sparse_lowrank.sizes.ROW_ALIGNMENT`.
    """
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    if matrix.dtype.itemsize != 2 or matrix.stride(0) * matrix.dtype.itemsize % 16 == 0:
        return matrix
    return _empty_with_aligned_rows(matrix, *matrix.shape).copy_(matrix)


def _empty_with_aligned_rows(like: Tensor, rows: int, columns: int) -> Tensor:
    pitch = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return like.new_empty(rows, pitch)[:, :columns]


def sum_over_tokens(q: Tensor, x: Tensor) -> Tensor:
    """Returns qᵀx, (r, n), contiguous, for x as of :func:`aligned_rows`."""
    if x.stride(0) == x.shape[1] or torch.compiler.is_compiling():
        return torch.mm(q.t(), x).contiguous()
    out = _empty_with_aligned_rows(x, q.shape[1], x.shape[1])
    return torch.mm(q.t(), x, out=out).contiguous()


def blocks_outputs(
    x: Tensor, h: Sequence[Tensor], Bs: Sequence[Tensor], Vs: Sequence[Tensor], supports: Sequence[Support]
) -> tuple[Tensor, ...]:
    """Returns hBᵀ + xSᵀ of every layer, (T, m).

    Args:
        x: (T, n), as of :func:`aligned_rows`.
        h: s·xAᵀ of each layer, (T, r).
        Bs: B of each layer, (m, r).
        Vs: V of each layer.
        supports: Support of each layer.
    """
    outputs = []
    for h_i, B, V, support in zip(h, Bs, Vs, supports, strict=True):
        assert isinstance(support, BlockSupport)
        if B.shape[1] <= FUSED_RANK:
            y = x.new_empty(x.shape[0], support.m)
            add_outputs_(y, x, V, support, (h_i, B), add=False)
        else:
            y = torch.mm(h_i, B.to(x.dtype).t())
            add_outputs_(y, x, V, support, None, add=True)
        outputs.append(y)
    return tuple(outputs)


def blocks_input_gradient(
    q: Tensor, grads: Sequence[Tensor], As: Sequence[Tensor], Vs: Sequence[Tensor], supports: Sequence[Support]
) -> Tensor:
    """Returns dx = Σ (qA + gS) over the layers, (T, n).

    Args:
        q: s·gB of all layers side by side, (T, Σr).
        grads: g of each layer, (T, m), as of :func:`aligned_rows`.
        As: A of each layer, (r, n).
        Vs: V of each layer.
        supports: Support of each layer.
    """
    ranks = [A.shape[0] for A in As]
    fused = max(ranks) <= FUSED_RANK
    if fused:
        dx = q.new_empty(q.shape[0], supports[0].n)
    else:
        dx = torch.mm(q, As[0].to(q.dtype) if len(As) == 1 else torch.cat([A.to(q.dtype) for A in As]))
    for i, (q_i, g, A, V, support) in enumerate(zip(q.split(ranks, dim=1), grads, As, Vs, supports, strict=True)):
        assert isinstance(support, BlockSupport)
        add_inputs_(dx, g, V, support, (q_i, aligned_rows(A)) if fused else None, add=not fused or i > 0)
    return dx


def blocks_values_gradient(x: Tensor, g: Tensor, support: Support) -> Tensor:
    """Returns dV, (m, k) in float32, for x (T, n) and g (T, m) as of :func:`aligned_rows`."""
    assert isinstance(support, BlockSupport)
    return sum_values(g, x, support)
