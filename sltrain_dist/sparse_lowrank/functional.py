"""The operator y = x (s·BA + S)ᵀ as autograd functions that save nothing of size m×n."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain_dist.sparse_lowrank.support import Support


def sl_linear(
    x: Tensor, B: Tensor, A: Tensor, V: Tensor, support: Support, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Applies W = scale·BA + S to x, where S holds V at the positions of `support` (the paper's Algorithm 1).

    W is built, used and thrown away, and built again in the backward pass; saved for backward are only
    the leaves themselves and x. Under autocast everything is cast to autocast's type, as by `F.linear`.

    Args:
        x: (..., n); any number of tokens, also none.
        B: (m, r).
        A: (r, n).
        V: Values, of shape `support.values_shape`.
        support: The positions of V.
        scale: s = alpha / r.
        bias: (m,) or None.

    Returns:
        (..., m), of x's type, or of autocast's.

    Raises:
        ValueError: Shapes or types do not fit together.
    """
    device = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        _check_types(x, B=B, A=A, V=V, bias=bias)
    _check_shapes(x, B, A, V, support, bias)
    return _Materialize.apply(x.to(dtype), B, A, V, bias, support.row_positions(0, support.m), scale)


def build_weight(B: Tensor, A: Tensor, V: Tensor, positions: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W = scale·BA + S as a new (m, n) tensor of type `dtype`."""
    W = torch.mm(B.to(dtype), A.to(dtype)).mul_(scale)
    # In place, and with int32 positions as they are: neither W nor the positions get a second copy.
    W.view(-1).index_add_(0, positions, V.to(dtype).view(-1))
    return W


class _Materialize(torch.autograd.Function):
    # Leaves are saved as they came: a detached or cast copy would stay alive under ZeRO-3 and FSDP, which
    # free and gather the leaves' storage around forward and backward.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, A: Tensor, V: Tensor, bias: Tensor | None, positions: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, B, A, V, positions)
        ctx.scale = scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        W = build_weight(B, A, V, positions, scale, x.dtype)
        return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, V, positions = ctx.saved_tensors
        need_x, need_B, need_A, need_V, need_bias = ctx.needs_input_grad[:5]
        g = grads[0].reshape(-1, grads[0].shape[-1])
        dx = dB = dA = dV = dbias = None
        if need_x:
            W = build_weight(B, A, V, positions, ctx.scale, x.dtype)
            dx = (g @ W).view(x.shape)
            del W  # before G, so that only one m×n tensor exists at a time
        if need_B or need_A or need_V:
            G = g.t() @ x.reshape(-1, x.shape[-1])
            if need_B:
                dB = (G @ A.to(x.dtype).t()).mul_(ctx.scale).to(B.dtype)
            if need_A:
                dA = (B.to(x.dtype).t() @ G).mul_(ctx.scale).to(A.dtype)
            if need_V:
                dV = G.view(-1).index_select(0, positions).view(V.shape).to(V.dtype)
        if need_bias:
            dbias = g.sum(0).to(ctx.bias_dtype)
        return dx, dB, dA, dV, dbias, None, None


def _check_types(x: Tensor, **parameters: Tensor | None) -> None:
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype != x.dtype:
            raise ValueError(
                f"x is {x.dtype} but {name} is {parameter.dtype}; cast one of them, or run under torch.autocast"
            )
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; the operator takes floating-point tensors")


def _check_shapes(x: Tensor, B: Tensor, A: Tensor, V: Tensor, support: Support, bias: Tensor | None) -> None:
    m, n = B.shape[0], A.shape[1]
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not have one rank")
    if x.dim() == 0 or x.shape[-1] != n:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features = {n}")
    if (m, n) != (support.m, support.n):
        raise ValueError(f"B and A make a {m}×{n} weight, but the support is of a {support.m}×{support.n} one")
    if tuple(V.shape) != support.values_shape:
        raise ValueError(f"V has shape {tuple(V.shape)}; the support has values for {support.values_shape}")
    if bias is not None and tuple(bias.shape) != (m,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({m},)")
