"""The path `materialize` (the paper's Algorithm 1): W is built, used and freed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain_dist.numerics.int8_weight import plain
from sltrain_dist.sparse_lowrank.kept import keep
from sltrain_dist.sparse_lowrank.paths.factored import differentiable, factored_backward, scaled_mm
from sltrain_dist.sparse_lowrank.supports.support import Support


class Materialize(torch.autograd.Function):
    """Computes y = x (s·BA + S)ᵀ by building W, some rows at a time if transient memory is bounded.

    The backward pass either builds W again, for dx, and the dense gradient, from which dB, dA and dV are taken; or it
    forms neither and works as in the path `factored` (fewer operations for few tokens).
    """

    # Parameters are saved as they are passed: a detached or cast copy would stay alive under ZeRO-3 and FSDP, which
    # free and gather the parameters' storage around forward and backward.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        B: Tensor,
        A: Tensor,
        V: Tensor,
        support: Support,
        scale: float,
        block_rows: int,
        dense_backward: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, B, A, V)
        ctx.support, ctx.scale, ctx.block_rows, ctx.dense_backward = support, scale, block_rows, dense_backward
        outputs, _ = keep(lambda: ((_multiply(x, B, A, V, support, scale, block_rows),), None))
        return outputs[0] if block_rows >= support.m else differentiable(outputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        B, A, V = (plain(parameter, x.dtype) for parameter in parameters)
        needs = ctx.needs_input_grad[:4]
        if ctx.dense_backward:
            gradients = _dense_backward(x, B, A, V, grads[0], ctx.support, ctx.scale, ctx.block_rows, needs)
        else:
            dx, (factor_gradients,) = factored_backward(x, None, grads, [(B, A, V)], [ctx.support], [ctx.scale], needs)
            gradients = (dx, *factor_gradients)
        return *gradients, None, None, None, None


def _multiply(x: Tensor, B: Tensor, A: Tensor, V: Tensor, support: Support, scale: float, block_rows: int) -> Tensor:
    """Returns xWᵀ, (T, m)."""
    B, A, V = (plain(parameter, x.dtype) for parameter in (B, A, V))
    if block_rows >= support.m:
        return torch.mm(x, build_rows(B, A, V, support, scale, x.dtype, 0, support.m).t())
    y = x.new_empty(x.shape[0], support.m)
    for first, last in _row_chunks(support.m, block_rows):
        y[:, first:last] = torch.mm(x, build_rows(B, A, V, support, scale, x.dtype, first, last).t())
    return y


def build_rows(
    B: Tensor, A: Tensor, V: Tensor, support: Support, scale: float, dtype: torch.dtype, first: int, last: int
) -> Tensor:
    """Returns rows first … last − 1 of W = scale·BA + S, as a new tensor of type `dtype`."""
    W = scaled_mm(B[first:last].to(dtype), A.to(dtype), scale)
    support.add_to_rows_(W, V, first, last)
    return W


def _dense_backward(
    x: Tensor,
    B: Tensor,
    A: Tensor,
    V: Tensor,
    g: Tensor,
    support: Support,
    scale: float,
    block_rows: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    need_x, need_B, need_A, need_V = needs
    dx = torch.zeros_like(x) if need_x else None
    dB = torch.empty_like(B) if need_B else None
    dA = torch.zeros_like(A, dtype=x.dtype) if need_A else None
    dV = torch.empty_like(V) if need_V else None
    for first, last in _row_chunks(support.m, block_rows):
        g_rows = g[:, first:last]
        if dx is not None:
            dx.addmm_(g_rows, build_rows(B, A, V, support, scale, x.dtype, first, last))
        if not (need_B or need_A or need_V):
            continue
        G = torch.mm(g_rows.t(), x)  # after W is freed, so that only one m×n tensor exists at a time
        if dB is not None:
            dB[first:last] = torch.mm(G, A.to(x.dtype).t()).mul_(scale)
        if dA is not None:
            dA.addmm_(B[first:last].to(x.dtype).t(), G)
        if dV is not None:
            dV.view(-1)[support.row_values(first, last)] = support.take_from_rows(G, first, last)
    return dx, dB, None if dA is None else dA.mul_(scale).to(A.dtype), dV


def _row_chunks(m: int, block_rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, m, block_rows):
        yield first, min(first + block_rows, m)
