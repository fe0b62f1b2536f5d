"""optim/matrix/optimizer.py on one rank; tests/distributed has the engines, and several ranks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sltrain_dist.config.load import build_config, merged
from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.models.count import parameter_shapes
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim import low_bit_states, state_layout
from sltrain_dist.optim.factory import adopt_state, clear_states, make_optimizer, saved_states, set_lr
from sltrain_dist.optim.matrix.jobs import WholeMatrices
from sltrain_dist.optim.matrix.spectrum import orthogonalize
from sltrain_dist.parallel.whole_layers import deal
from sltrain_dist.train.step import forward_backward
from tests.support.ranks import SINGLE
from tests.unit.parallel.test_per_layer import Training, config_of, rows_of

SHAPES = {"up_proj.B": (44, 6), "up_proj.A": (6, 32), "down_proj.B": (32, 6), "down_proj.A": (6, 44)}


def matrices(dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for name, shape in SHAPES.items()}


def gradients(update: int) -> dict[str, Tensor]:
    """Multiples of 1/8, with which a momentum of 1/2 is exact whatever the order of its operations."""
    random = torch.Generator().manual_seed(1000 + update)
    return {name: torch.randint(-64, 64, shape, generator=random) / 8 for name, shape in SHAPES.items()}


def optimizer_of(named: dict[str, nn.Parameter], scale: float = 1.0, **optim: Any) -> torch.optim.Optimizer:
    whole = WholeMatrices(partial(deal, env=SINGLE), scale)
    return make_optimizer(named.items(), OptimConfig(**{"factors": "muon", **optim}), whole_matrices=whole)


def update(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    for name, gradient in gradients(number).items():
        named[name].grad = gradient.to(named[name].dtype)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_is_that_of_torch(scale: Any) -> None:
    """With weight decay, over several updates. Only the last roundings of a weight's change may differ."""
    ours, theirs = matrices(), matrices()
    optimizer = optimizer_of(ours, lr=0.02, weight_decay=0.25, momentum=0.5, factors_scale=scale)
    reference = torch.optim.Muon(theirs.values(), lr=0.02, weight_decay=0.25, momentum=0.5, adjust_lr_fn=scale)
    for number in range(4):
        update(ours, optimizer, number)
        update(theirs, reference, number)
        for name, parameter in ours.items():
            momentum = reference.state[theirs[name]]["momentum_buffer"]
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"].view(parameter.shape), momentum)
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-7)


def test_another_momentum_is_seen() -> None:
    """Negative control of the comparison with torch."""
    ours, theirs = matrices(), matrices()
    optimizer = optimizer_of(ours, lr=0.02, momentum=0.75)
    reference = torch.optim.Muon(
        theirs.values(), lr=0.02, weight_decay=0.0, momentum=0.5, adjust_lr_fn="match_rms_adamw"
    )
    for number in range(2):
        update(ours, optimizer, number)
        update(theirs, reference, number)
    assert not torch.allclose(ours["up_proj.B"], theirs["up_proj.B"], atol=1e-4)


@pytest.mark.parametrize("matched", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_spectron_step_by_step(scale: float, matched: bool) -> None:
    """Against the definition in float64, with exact spectral norms."""
    named = matrices()
    expected = {name: p.detach().double() for name, p in named.items()}
    averages = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    optim = {"factors": "spectron", "lr": 0.1, "factors_lr_ratio": 0.5, "weight_decay": 0.1, "newton_schulz": "fp32"}
    optimizer = optimizer_of(named, scale, **optim, factors_scale="match_rms_adamw" if matched else "original")
    lr = 0.1 * 0.5
    for number in range(4):
        update(named, optimizer, number)
        for layer, (m, n) in (("up_proj", (44, 32)), ("down_proj", (32, 44))):
            B, A = f"{layer}.B", f"{layer}.A"
            norms = sum(float(torch.linalg.matrix_norm(expected[name], 2)) for name in (B, A))
            eta = lr * 0.2 * math.sqrt(max(m, n)) if matched else lr
            rho = eta / (scale * norms + math.sqrt(scale))
            for name in (B, A):
                averages[name] = 0.95 * averages[name] + (1 - 0.95) * gradients(number)[name]
                change = orthogonalize(averages[name], torch.float64)
                expected[name] = expected[name] * (1 - lr * 0.1) - rho * change
    for name, parameter in named.items():
        found = parameter.detach().double()
        error = (found - expected[name]).norm() / (found - matrices()[name].detach()).norm()
        assert float(error) < 6 ** (1 / 512) - 1 + 1e-4  # the norms are too large by up to 6^(1/512)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_spectron_bounds_the_change_of_the_product(size: float) -> None:
    """However large the factors are, and whatever s is. Muon does not."""
    changes = {}
    for factors in ("spectron", "muon"):
        named = {name: nn.Parameter(size * parameter.detach()) for name, parameter in matrices().items()}
        optimizer = optimizer_of(named, 2.0, factors=factors, lr=0.05, factors_scale="original")
        before = 2.0 * named["up_proj.B"].detach() @ named["up_proj.A"].detach()
        update(named, optimizer, 0)
        after = 2.0 * named["up_proj.B"].detach() @ named["up_proj.A"].detach()
        changes[factors] = float(torch.linalg.matrix_norm(after - before, 2))
    assert 0.005 < changes["spectron"] < 0.05 * 1.25  # orthogonalized momentum has singular values of up to 1.2
    assert (changes["muon"] > 0.05 * 1.25) == (size >= 1)


def test_scaling_the_factors_is_part_of_the_scale() -> None:
    """s·BA with s = 4 is trained as the product of 2B and 2A."""
    scaled, folded = matrices(), {name: nn.Parameter(2 * p.detach()) for name, p in matrices().items()}
    optim = {"factors": "spectron", "lr": 0.1, "newton_schulz": "fp32"}
    update(scaled, optimizer_of(scaled, 4.0, **optim), 0)
    update(folded, optimizer_of(folded, 1.0, **optim), 0)
    for name, parameter in scaled.items():
        torch.testing.assert_close(2 * parameter, folded[name], rtol=1e-5, atol=1e-6)


FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "masters": {"dtype": torch.bfloat16, "master_weights": True, "state_bits": 32},
    "rounded": {"dtype": torch.bfloat16, "stochastic_rounding": True},
    "8 bits": {"dtype": torch.bfloat16, "state_bits": 8},
    "4 bits": {"dtype": torch.float32, "state_bits": 4},
}


@pytest.fixture
def _small_parameters_are_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_layout, "QUANTIZED_FROM", 100)


@pytest.mark.usefixtures("_small_parameters_are_quantized")
@pytest.mark.parametrize("factors", ["muon", "spectron"])
@pytest.mark.parametrize("form", FORMS)
def test_goes_on_bit_for_bit_from_its_saved_states(form: str, factors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In smaller chunks, too."""
    settings = {key: value for key, value in FORMS[form].items() if key != "dtype"}
    straight = matrices(FORMS[form]["dtype"])
    optim = OptimConfig(factors=factors, lr=0.02, weight_decay=0.1, **settings)
    optimizer = optimizer_of(straight, **optim.model_dump())
    for number in range(3):
        update(straight, optimizer, number)
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in straight.items()}
    again = optimizer_of(resumed, **optim.model_dump())
    for name, parameter in straight.items():
        part = TensorRange.whole(name, SHAPES[name])
        saved = {
            stored.range.name: values.clone() for stored, values in saved_states(optimizer, parameter, part, optim)
        }
        assert {key.partition(".")[0] for key in saved} <= {"momentum_buffer", "master"}
        adopt_state(again, resumed[name], saved, 3)
    monkeypatch.setattr(low_bit_states, "_CHUNK_CPU", 64)
    for number in range(3, 6):
        update(straight, optimizer, number)
        update(resumed, again, number)
    for name, parameter in straight.items():
        assert torch.equal(resumed[name], parameter), name


@pytest.mark.usefixtures("_small_parameters_are_quantized")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_momentum_trains_about_alike(bits: Any) -> None:
    exact, rounded = matrices(), matrices()
    optim = {"lr": 0.02, "newton_schulz": "fp32"}
    optimizers = optimizer_of(exact, **optim), optimizer_of(rounded, **optim, state_bits=bits)
    for number in range(5):
        update(exact, optimizers[0], number)
        update(rounded, optimizers[1], number)
    for name, parameter in exact.items():
        moved = float((parameter.detach() - matrices()[name].detach()).norm())
        error = float((rounded[name] - parameter).detach().norm()) / moved
        assert 0 < error < {8: 0.02, 4: 0.2}[bits], name


def test_cleared_states_are_those_of_a_new_optimizer() -> None:
    named = matrices()
    optimizer = optimizer_of(named, lr=0.02)
    for number in range(2):
        update(named, optimizer, number)
    for parameter in named.values():
        clear_states(optimizer, parameter)
    fresh = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    update(named, optimizer, 2)
    update(fresh, optimizer_of(fresh, lr=0.02), 2)
    assert all(torch.equal(named[name], fresh[name]) for name in named)


def test_the_learning_rate_of_the_schedule_is_used() -> None:
    named = matrices()
    optimizer = optimizer_of(named, lr=0.02, weight_decay=0.1)
    set_lr(optimizer, 0.0)
    update(named, optimizer, 0)
    assert all(torch.equal(named[name], parameter) for name, parameter in matrices().items())


class TestRefused:
    def test_what_is_no_matrix(self) -> None:
        with pytest.raises(ValueError, match=r"o_proj\.weight of shape \(7,\) is not a matrix"):
            optimizer_of({"self_attn.o_proj.weight": nn.Parameter(torch.zeros(7))})

    def test_a_factor_without_its_partner(self) -> None:
        with pytest.raises(ValueError, match="up_proj does not have both B and A"):
            optimizer_of({"up_proj.B": nn.Parameter(torch.zeros(7, 2))}, factors="spectron")

    def test_other_parameters_with_them(self) -> None:
        with pytest.raises(ValueError, match="the parameters need several optimizers"):
            optimizer_of({"up_proj.B": nn.Parameter(torch.zeros(7, 2)), "norm.weight": nn.Parameter(torch.zeros(7))})


@pytest.mark.parametrize("factors", ["muon", "spectron"])
def test_a_discarded_update_leaves_no_trace(factors: str) -> None:
    """Momentum is not biased, so that it has no count of updates that could go on."""
    training = Training(config_of(factors=factors, newton_schulz="fp32")).update(2)
    before = training.saved()
    training.engine.begin_update(training.config.optim.lr, training.norm)
    forward_backward(training.engine, rows_of(7), training.config.train.micro_batch, SINGLE)
    training.engine.discard()
    after = training.saved()
    assert before.keys() == after.keys()
    assert any(name.endswith("B.momentum_buffer") for name in after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_matrices_of_each_method() -> None:
    """With full, muon updates dense weights of attention and MLP, but no embedding and no head."""
    for values, endings in (
        ({"reparam": {"method": "full"}}, {"_proj.weight"}),
        ({}, {"_proj.B", "_proj.A"}),
        ({"reparam": {"dense_layers": [0]}}, {"_proj.B", "_proj.A", "_proj.weight"}),
    ):
        config = build_config(merged(config_of().model_dump(), {"optim": {"factors": "muon"}, **values}))
        saved = Training(config).update().saved()
        orthogonalized = {name.removeprefix("optim.").removesuffix(".momentum_buffer") for name in saved
                          if name.endswith(".momentum_buffer")}  # fmt: skip
        named = dict(parameter_shapes(config.model, config.reparam))
        expected = {name for name in named if name.endswith(tuple(endings))}
        assert orthogonalized == expected
        assert all(f"optim.{name}.exp_avg" in saved for name in named.keys() - expected)
