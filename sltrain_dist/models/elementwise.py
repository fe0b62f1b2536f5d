"""Rotary embedding and RMS normalisation with few passes over memory, forward and backward.

On the CPU, autograd of the composed operations takes two to three times as long
(docs/reports/2026-11-24-operator-cpu.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sltrain_dist.numerics.device import is_emulated


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding, with halves paired as in Hugging Face's implementation.

    Args:
        x: (batch, heads, length, head_dim).
        cos: (length, head_dim), of x's type; the second half repeats the first.
        sin: Likewise.

    Returns:
        A new tensor of x's shape.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_halves(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate_halves(grad, cos, -sin), None, None  # the inverse of a rotation is its transpose


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Applies root-mean-square normalisation over the last dimension (arXiv 1910.07467).

    Saves x and one float32 scalar per row for the backward pass. Narrower types are computed in float32.

    Args:
        x: (..., n).
        gain: (n,), of x's type.
        eps: Added to the mean square.

    Returns:
        (..., n), a new tensor.
    """
    if is_emulated("cuda"):
        return _FakeFusedRMSNorm.apply(x, gain)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, gain.shape, gain, eps)
    return _RMSNorm.apply(x, gain, eps)


class _FakeFusedRMSNorm(torch.autograd.Function):
    """A stand-in for CUDA's fused kernel (torch's _fused_rms_norm), which torch decomposes for fake CPU tensors.

    It allocates what the kernel does, and saves the input, the gain, and one float32 number per row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        if not is_fake(x):
            raise RuntimeError("a GPU can be emulated for fake tensors only, and this tensor is real")
        ctx.save_for_backward(x, gain, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, gain, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(gain)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse).mul_(gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        normed = x * inverse
        product = grad * normed
        rows = product.reshape(-1, x.shape[-1])
        d_gain = rows.sum(0).to(gain.dtype)
        wide = gain.to(inverse.dtype)
        projection = torch.mv(rows, wide).div_(x.shape[-1]).view(inverse.shape)
        dx = torch.mul(grad, wide, out=product).addcmul_(normed, projection, value=-1).mul_(inverse)
        return dx.to(x.dtype), d_gain, None
