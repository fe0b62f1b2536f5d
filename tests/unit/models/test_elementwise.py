"""Rotary embedding and normalisation: equal to the composed operations, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sltrain_dist.models.elementwise import rms_norm, rotate
from sltrain_dist.models.llama import RotaryEmbedding


def composed_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in Hugging Face's modeling_llama.py."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def angles(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = RotaryEmbedding(6, 100.0, 8)(length, dtype)
    return cos, sin


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotate_is_the_composed_one(dtype: torch.dtype) -> None:
    x = random(2, 5, 3, 6, dtype=dtype).transpose(1, 2).requires_grad_()  # strided, as attention's are
    grad = random(2, 3, 5, 6, dtype=dtype)
    of = [(f(x, *angles(5, dtype)), f) for f in (rotate, composed_rotate)]
    (ours, _), (theirs, _) = of
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y, _ in of]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_rotate_gradcheck() -> None:
    x = random(2, 3, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, *angles(5, torch.float64)), x)


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (0, 6), (6,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, gain = random(*shape, dtype=dtype).requires_grad_(), random(6, dtype=dtype).requires_grad_()
    ours, theirs = rms_norm(x, gain, 1e-3), F.rms_norm(x, (6,), gain, 1e-3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    grad = random(*shape, dtype=dtype).flip(0)
    for a, b in zip(*(torch.autograd.grad(y, (x, gain), grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rms_norm_of_bf16_is_rounded_once_and_keeps_no_copy() -> None:
    x, gain = random(33, 64, dtype=torch.bfloat16).requires_grad_(), random(64, dtype=torch.bfloat16).requires_grad_()
    grad = random(33, 64, dtype=torch.bfloat16).flip(0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rms_norm(x, gain, 1e-3)
    assert {t.data_ptr() for t in kept} >= {x.data_ptr(), gain.data_ptr()}
    assert sum(t.nbytes for t in kept) == x.nbytes + gain.nbytes + 33 * 4
    exact_x, exact_gain = (t.detach().double().requires_grad_() for t in (x, gain))
    exact = F.rms_norm(exact_x, (64,), exact_gain, 1e-3)
    got = (y, *torch.autograd.grad(y, (x, gain), grad))
    want = (exact, *torch.autograd.grad(exact, (exact_x, exact_gain), grad.double()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5)


def test_rms_norm_gradcheck() -> None:
    x, gain = random(2, 4, 6).requires_grad_(), random(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, gain: rms_norm(x, gain, 1e-3), (x, gain))


def test_rms_norm_of_zeros_has_a_gradient() -> None:
    """A row of zeros, such as an embedding of zeros gives, is what eps is for."""
    x = torch.zeros(2, 6, requires_grad=True)
    rms_norm(x, torch.ones(6), 1e-3).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 6), 1e-3**-0.5))
