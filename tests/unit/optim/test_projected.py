"""optim/projected: the steps of GaLore and APOLLO against their published arithmetic, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sltrain_dist.config.load import build_config
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.factory import adopt_state, by_optimizer, make_optimizer, saved_states, set_lr, state_tensors
from sltrain_dist.optim.projected.projection import gaussian_projection
from sltrain_dist.optim.projected.settings import ProjectedOptim, optimizer_settings
from sltrain_dist.optim.state_layout import stored_states

NAME = "model.layers.0.mlp.up_proj.weight"
EVERY, UPDATES = 3, 8
METHODS = ("galore", "apollo", "apollo-mini")
SHAPES = ((7, 5), (5, 7), (6, 6))


def settings(method: str, rank: int = 3, **optim: Any) -> ProjectedOptim:
    sections = {"reparam": {"method": method, "rank": rank}, "train": {"steps": 1}, "seed": 3}
    found = optimizer_settings(build_config({**sections, "optim": {"projection_every": EVERY, **optim}}))
    assert isinstance(found, ProjectedOptim)
    return found


def gradient(update: int, shape: tuple[int, int]) -> Tensor:
    """Gradients that are nearly of low rank, and that grow fast between updates 4 and 5, for the limiter."""
    g = torch.Generator().manual_seed(update)
    low = torch.randn(shape[0], 2, generator=g) @ torch.randn(2, shape[1], generator=g)
    return (low + 0.1 * torch.randn(*shape, generator=g)) * (10.0 if update >= 5 else 1.0)


class Reference:
    """The published step, from galore_torch/adamw.py and apollo_torch/apollo.py, written again in float64."""

    def __init__(self, weight: Tensor, optim: ProjectedOptim) -> None:
        self.W, self.optim, self.step = weight.double(), optim, 0
        self.M = self.V = torch.zeros(())
        self.norm: float | None = None

    def project(self, G: Tensor, used: Tensor | None) -> Tensor:
        right = G.shape[0] >= G.shape[1]
        if self.step % EVERY == 0:
            if self.optim.method == "galore":
                assert used is not None
                U, _, Vh = torch.linalg.svd(G, full_matrices=False)
                P = Vh[: self.optim.rank] if right else U[:, : self.optim.rank]
                # Singular vectors have no sign of their own; it matters where moments meet a new projection.
                self.P = P * (P * used).sum(1 if right else 0, keepdim=True).sign()
            else:
                name = f"{NAME}.{self.step // EVERY}"
                self.P = gaussian_projection(G.float(), self.optim.rank, self.optim.seed, name).double()
        return G @ self.P.T if right else self.P.T @ G

    def update(self, G: Tensor, used: Tensor | None, lr: float, decay: float) -> None:
        G, optim, right = G.double(), self.optim, G.shape[0] >= G.shape[1]
        R = self.project(G, used)
        self.step += 1
        self.M = optim.beta1 * self.M + (1 - optim.beta1) * R
        self.V = optim.beta2 * self.V + (1 - optim.beta2) * R * R
        N = self.M / (self.V.sqrt() + optim.eps)
        size = lr * math.sqrt(1 - optim.beta2**self.step) / (1 - optim.beta1**self.step)
        if optim.method == "galore":
            change = (N @ self.P if right else self.P @ N) * 0.25
        elif optim.method == "apollo":
            dim = 1 if right else 0
            change = self.limited(G * N.norm(dim=dim, keepdim=True) / (R.norm(dim=dim, keepdim=True) + 1e-8))
        else:
            change = self.limited(G * N.norm() / (R.norm() + 1e-8)) * math.sqrt(128)
        self.W = self.W - size * change
        self.W = self.W - lr * decay * self.W

    def limited(self, change: Tensor) -> Tensor:
        norm = float(change.norm())
        limiter = 1.0 if self.norm is None else max(norm / (self.norm + 1e-8), 1.01) / 1.01
        self.norm = norm / limiter
        return change / limiter


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_steps_follow_the_published_arithmetic(method: str, shape: tuple[int, int]) -> None:
    optim, start = settings(method, weight_decay=0.1, eps=1e-6), torch.randn(shape)
    parameter, reference = nn.Parameter(start.clone()), Reference(start, optim)
    optimizer = make_optimizer([(NAME, parameter)], optim)
    for update in range(UPDATES):
        lr = 0.01 * (update + 1)
        set_lr(optimizer, lr)
        parameter.grad = gradient(update, shape)
        optimizer.step()
        stored = state_tensors(optimizer, parameter).get("projection")
        used = None if stored is None else stored.view(optim.rank, -1) if shape[0] >= shape[1] else stored.view(-1, 3)
        reference.update(gradient(update, shape), used, lr, 0.1)
        torch.testing.assert_close(parameter.detach().double(), reference.W, rtol=2e-5, atol=2e-5)
    assert (parameter.detach() - start).norm() > 0.02 * start.norm()


def test_the_limiter_was_needed() -> None:
    """The gradients of the test above grow so much that without the limiter its reference would be another one."""
    free = Reference(torch.zeros(5, 7), settings("apollo"))
    norms = []
    for update in range(UPDATES):
        free.norm = None
        free.update(gradient(update, (5, 7)), None, 0.01, 0.0)
        assert free.norm is not None
        norms.append(free.norm)
    assert max(after / before for before, after in itertools.pairwise(norms)) > 1.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_states_stay_close_to_float32(method: str, bits: int) -> None:
    """Relative to the way that the weights have gone."""
    shape = (80, 96)
    weights = []
    for state_bits in (32, bits):
        optim, parameter = settings(method, rank=64, state_bits=state_bits), nn.Parameter(torch.zeros(shape))
        optimizer = make_optimizer([(NAME, parameter)], optim)
        for update in range(UPDATES):
            parameter.grad = gradient(update, shape)
            optimizer.step()
        weights.append(parameter.detach())
    error = float((weights[1] - weights[0]).norm() / weights[0].norm())
    quantized = method != "apollo-mini"  # whose states are too small
    assert (error > 0) == quantized
    assert error < {8: 0.03, 4: 0.2}[bits]


def test_random_projections_are_gaussian_and_keyed() -> None:
    wide = torch.zeros(300, 400)
    first, again, other = (gaussian_projection(wide, 100, 3, name) for name in ("a.0", "a.0", "a.1"))
    assert first.shape == (300, 100)
    assert torch.equal(first, again)
    assert abs(float((first * other).mean())) < 3 / 100 / math.sqrt(first.numel())
    values = first.flatten() * 10
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.var()) - 1) < 0.03
    assert abs(float((values.abs() < 1).float().mean()) - 0.6827) < 0.01
    assert abs(float((values**4).mean()) - 3) < 0.15
    assert gaussian_projection(wide.T, 100, 3, "a.0").shape == (100, 300)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_saved_states_continue_a_run_to_the_bit(method: str, bits: int) -> None:
    """In the middle between two projections, and through the next."""
    shape, optim = (96, 80), settings(method, rank=64, state_bits=bits)
    whole = TensorRange.whole(NAME, shape)
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = make_optimizer([(NAME, parameter)], optim)
    for update in range(UPDATES):
        if update == 4:
            found = saved_states(optimizer, parameter, whole, optim)
            saved = {state.range.name: values.clone() for state, values in found}
            kept, held = stored_states(whole, optim, 4), state_tensors(optimizer, parameter).values()
            assert {state.range.name: state.range.count for state in kept} == {n: v.numel() for n, v in saved.items()}
            assert sum(state.nbytes for state in kept) == sum(tensor.nbytes for tensor in held)
            resumed = nn.Parameter(parameter.detach().clone())
            other = make_optimizer([(NAME, resumed)], optim)
            adopt_state(other, resumed, saved, step=4)
        parameter.grad = gradient(update, shape)
        optimizer.step()
        if update >= 4:
            resumed.grad = gradient(update, shape)
            other.step()
            assert torch.equal(resumed, parameter)


def test_other_parameters_keep_the_ordinary_optimizer() -> None:
    optim = settings("galore")
    named = [(name, nn.Parameter(torch.zeros(6, 6))) for name in ("lm_head.weight", NAME, "model.norm.weight")]
    others, projected = by_optimizer(named, optim)
    assert [name for name, _ in projected] == [NAME]
    assert [name for name, _ in others] == ["lm_head.weight", "model.norm.weight"]
    assert isinstance(make_optimizer(others, optim), torch.optim.AdamW)
    assert by_optimizer(named, optimizer_settings(build_config({"train": {"steps": 1}}))) == [named]


def test_a_gradient_of_zero_does_not_stop_apollo() -> None:
    parameter = nn.Parameter(torch.zeros(6, 4))
    optimizer = make_optimizer([(NAME, parameter)], settings("apollo", lr=1.0))
    for update in range(3):
        parameter.grad = gradient(update, (6, 4)) if update else torch.zeros(6, 4)
        optimizer.step()
    assert float(parameter.detach().norm()) > 0.1
