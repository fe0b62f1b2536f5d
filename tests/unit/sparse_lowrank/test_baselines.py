"""Layers of CoLA and ReLoRA against their published arithmetic, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sltrain_dist.sparse_lowrank.baselines import ColaLinear, ReloraLinear, initial_A, merge

M, N, R = 44, 60, 8


def inputs() -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(5, N, generator=g), torch.randn(5, M, generator=g)


def test_cola_is_the_published_layer() -> None:
    """cola/cola_layer.py: `x @ cola_a`, its activation, and `@ cola_b`."""
    layer, (x, g) = ColaLinear(N, M, R, name="layer", seed=1), inputs()
    cola_a, cola_b = (p.detach().double().T.requires_grad_() for p in (layer.A, layer.B))
    hidden = x.double() @ cola_a
    expected = (hidden * torch.sigmoid(hidden)) @ cola_b
    expected.backward(g.double())
    got = layer(x)
    got.backward(g)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in ((layer.A, cola_a), (layer.B, cola_b)):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad.T, rtol=1e-4, atol=1e-5)


def test_cola_starts_as_published() -> None:
    """`randn / rank ** (1 / 4) * target_sdv ** (1 / 2)` with `target_sdv = (in + out) ** (-1 / 2)`."""
    layer = ColaLinear(300, 200, 64, name="layer", seed=1)
    std = 64 ** (-1 / 4) * (500 ** (-1 / 2)) ** (1 / 2)
    for parameter in (layer.A.detach(), layer.B.detach()):
        assert float(parameter.std()) == pytest.approx(std, rel=0.02)
        assert abs(float(parameter.mean())) < 0.02 * std
    again, other = ColaLinear(300, 200, 64, name="layer", seed=1), ColaLinear(300, 200, 64, name="layer", seed=2)
    assert torch.equal(layer.A, again.A) and not torch.equal(layer.A, other.A)


def test_relora_is_the_published_layer() -> None:
    """peft_pretraining/relora.py: `F.linear(x, weight) + lora_B(lora_A(x)) * lora_alpha / r`, and its merge."""
    layer, (x, g) = ReloraLinear(N, M, R, 12.0, std=0.02, name="layer", seed=1), inputs()
    with torch.no_grad():
        torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(1))
    W, B, A = (p.detach().double() for p in (layer.weight, layer.B, layer.A))
    B.requires_grad_()
    A.requires_grad_()
    expected = x.double() @ W.T + (x.double() @ A.T) @ B.T * 12.0 / R
    expected.backward(g.double())
    got = layer(x)
    got.backward(g)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None and not layer.weight.requires_grad
    for mine, theirs in ((layer.A, A), (layer.B, B)):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        new_W, new_B, _ = merge(layer.weight, layer.B, layer.A, layer.scale)
        torch.testing.assert_close(new_W.double(), W + B @ A * 12.0 / R, rtol=1e-5, atol=1e-5)
        assert torch.equal(new_W, layer.dense_weight())
        assert not new_B.any()


def test_relora_starts_as_published() -> None:
    """A from `kaiming_uniform_(a=√5)`, at the start and after every merge, each time other values."""
    layer = ReloraLinear(300, 200, 64, 12.0, std=0.02, name="layer", seed=1)
    assert not layer.B.any()
    assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    draws = [initial_A(300, 1, "layer", merges).read(0, 64 * 300).view(64, 300) for merges in range(3)]
    assert torch.equal(layer.A, draws[0])
    bound = math.sqrt(6 / ((1 + 5) * 300))
    for drawn in draws:
        assert 0.999 * bound < float(drawn.abs().max()) <= bound
        assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not torch.equal(draws[1], draws[0]) and not torch.equal(draws[1], draws[2])
