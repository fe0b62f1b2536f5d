"""parallel/whole_layers.py on one rank; tests/distributed has the other engines, and several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sltrain_dist.config.load import build_config, merged
from sltrain_dist.config.schema import Config
from sltrain_dist.models.build import build_model
from sltrain_dist.models.count import factor_pairs
from sltrain_dist.numerics.int8_weight import plain
from sltrain_dist.optim import state_layout
from sltrain_dist.optim.restarts import restart_is_due
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.parallel.whole_layers import restart, rewrite
from sltrain_dist.sparse_lowrank.layer import LowRankLinear, SLLinear
from sltrain_dist.train.build import start_engine
from tests.support.configs import TRAINED
from tests.support.ranks import SINGLE
from tests.unit.parallel.test_per_layer import Training

EVERY = 2


@pytest.fixture(autouse=True)
def _small_parameters_are_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_layout, "QUANTIZED_FROM", 100)


def config_of(**sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "model": {**TRAINED, "init_std": 0.2},
        "reparam": {"rank": 6, "density": 0.1, "alpha": 12.0, "restart_every": EVERY},
        "data": {"seq_len": 16},
        "optim": {"lr": 0.004},
        "train": {"steps": 10, "micro_batch": 8, "global_batch": 8, "dtype": "fp32"},
    }
    return build_config(merged(base, sections))


def dense_weights(training: Training) -> dict[str, Tensor]:
    """W of every low-rank layer."""
    modules = training.engine.module.named_modules()
    return {name: m.dense_weight().float() for name, m in modules if isinstance(m, SLLinear | LowRankLinear)}


def factors(training: Training) -> Iterator[tuple[Tensor, Tensor]]:
    named = dict(training.engine.module.named_parameters())
    for (B, _), (A, _) in factor_pairs(training.config.model, training.config.reparam):
        yield plain(named[B], torch.float32).detach().float(), plain(named[A], torch.float32).detach().float()


ROUNDINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "fp32": (2e-6, {}),
    "low rank": (2e-6, {"reparam": {"method": "lowrank"}}),
    "bf16": (5e-3, {"train": {"dtype": "bf16"}}),
    "bf16 with masters": (5e-3, {"train": {"dtype": "bf16"}, "optim": {"master_weights": True}}),
    "int8": (2e-2, {"reparam": {"weight_bits": 8}}),
}
"""By case: how far rounding moves W, as a share of its norm, and the settings."""


@pytest.mark.parametrize("case", ROUNDINGS)
@pytest.mark.parametrize("support", ["random", "blocks"])
def test_weights_stay_and_factors_are_balanced(case: str, support: str) -> None:
    most, sections = ROUNDINGS[case]
    training = Training(config_of(**merged({"reparam": {"support": support}}, sections))).update(EVERY)
    before, saved = dense_weights(training), training.saved()
    restart(training.engine, training.config, SINGLE)
    after = dense_weights(training)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert float((after[name] - weight).norm() / weight.norm()) < most, name
    V = {name: values for name, values in saved.items() if name.startswith("model.") and ".V" in name}
    assert all(torch.equal(training.saved()[name], values) for name, values in V.items())
    for B, A in factors(training):
        grams = B.T @ B, (training.config.reparam.alpha / 6) ** 2 * A @ A.T
        torch.testing.assert_close(*grams, rtol=0, atol=max(10 * most, 1e-4) * float(grams[0].max()))
        off_diagonal = grams[0] - torch.diag(grams[0].diag())
        assert float(off_diagonal.abs().max()) < max(10 * most, 1e-4) * float(grams[0].max())


def test_master_weights_are_factored_exactly() -> None:
    """Not the bf16 values that are rounded from them."""
    training = Training(config_of(train={"dtype": "bf16"}, optim={"master_weights": True})).update(EVERY)
    layer = "model.layers.0.mlp.up_proj"

    def product() -> Tensor:
        saved = training.saved()
        B, A = (saved[f"optim.{layer}.{factor}.master"] for factor in "BA")
        return B.view(44, 6) @ A.view(6, 32)

    before = product()
    restart(training.engine, training.config, SINGLE)
    assert float((product() - before).norm() / before.norm()) < 2e-6
    saved = training.saved()
    assert torch.equal(saved[f"model.{layer}.B"], saved[f"optim.{layer}.B.master"].bfloat16())


FORMS: dict[str, dict[str, Any]] = {
    "torch": {},
    "adafactor": {"optim": {"name": "adafactor"}},
    "sgd": {"optim": {"name": "sgd"}},
    "8 bits": {"optim": {"state_bits": 8}},
    "4 bits, per layer": {"optim": {"state_bits": 4, "update": "per_layer"}},
    "masters, rounded": {"optim": {"state_bits": 32, "master_weights": True}, "train": {"dtype": "bf16"}},
    "rounded": {"optim": {"stochastic_rounding": True}, "train": {"dtype": "bf16"}},
    "int8": {"optim": {"state_bits": 8}, "reparam": {"weight_bits": 8}},
    "muon, masters": {
        "optim": {"factors": "muon", "state_bits": 32, "master_weights": True},
        "train": {"dtype": "bf16"},
    },
    "spectron, 8 bits": {"optim": {"factors": "spectron", "state_bits": 8}},
}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "rounded"])
def test_cleared_states_are_those_of_a_new_optimizer(form: str) -> None:
    """The update after a restart is the first update of a run that starts from these weights."""
    config = config_of(**FORMS[form])
    training = Training(config).update(EVERY)
    restart(training.engine, training.config, SINGLE)
    saved = training.saved()
    new = Training(config)
    new.engine.load(lambda name, start, count: saved[name][start : start + count], 0)
    new.step, new.norm = training.step, training.norm
    if "masters" in form:
        for piece in new.engine._replicas.pieces:  # masters are values: they are kept
            optimizer = new.engine._replicas._optimizer_of[piece.name]
            optimizer.state[piece.parameter] = optimizer.make_state(piece.parameter)
            optimizer.state[piece.parameter]["master"].copy_(saved[f"optim.{piece.name}.master"])
    training.update(2)
    new.update(2)
    assert training.norms[EVERY:] == pytest.approx(new.norms, rel=1e-2 if form == "int8" else 1e-7)
    if form != "int8":  # its rounding is keyed by the count of all updates
        for name, weight in new.saved().items():
            assert torch.equal(training.saved()[name], weight), name


def test_states_of_the_factors_alone() -> None:
    training = Training(config_of(reparam={"restart_states": "factors"})).update(EVERY)
    before = {name: state for name, state in training.saved().items() if name.startswith("optim.")}
    restart(training.engine, training.config, SINGLE)
    after = training.saved()
    for name, state in before.items():
        is_factor = name.rpartition(".")[0].endswith((".B", ".A"))
        assert state.any()
        assert torch.equal(after[name], torch.zeros_like(state) if is_factor else state), name


@pytest.mark.parametrize(
    ("form", "cleared"),
    [
        ("torch", "all"),
        ("torch", "factors"),
        ("4 bits, per layer", "all"),
        ("masters, rounded", "factors"),
        ("rounded", "all"),
        ("int8", "factors"),
        ("muon, masters", "factors"),
        ("spectron, 8 bits", "all"),
    ],
)
def test_goes_on_bit_for_bit_around_a_restart(form: str, cleared: str) -> None:
    """From just before, at and just after the first of two restarts."""
    config = config_of(**merged(FORMS[form], {"reparam": {"restart_states": cleared}, "optim": {"clip": 0.05}}))
    straight, saved = Training(config), []
    for _ in range(2 * EVERY + 1):
        restart_if_due(straight)
        saved.append((straight.update().saved(), straight.norm))
    for stopped in (EVERY - 1, EVERY, EVERY + 1):
        tensors, norm = saved[stopped - 1]
        second = resumed(config, tensors, stopped)
        second.norm = norm
        for _ in range(stopped, straight.step):
            restart_if_due(second)
            second.update()
        assert second.norms == straight.norms[stopped:]
        for name, tensor in saved[-1][0].items():
            assert torch.equal(second.saved()[name], tensor), name


def restart_if_due(training: Training) -> None:
    if restart_is_due(training.config.reparam, training.step):
        restart(training.engine, training.config, SINGLE)


def resumed(config: Config, saved: dict[str, Tensor], step: int) -> Training:
    """What the training loop makes of a checkpoint."""
    training = Training(config)
    training.engine = start_engine(config, SINGLE, lambda name, start, count: saved[name][start : start + count], step)
    training.step = step
    return training


def test_random_numbers_do_not_repeat_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is keyed by the count of all updates, not by that of Adam's bias correction."""
    keys: list[int] = []
    monkeypatch.setattr("sltrain_dist.optim.low_bit_states.rounding_key", lambda step, name: keys.append(step) or step)
    training = Training(config_of(train={"dtype": "bf16"}, optim={"stochastic_rounding": True})).update(2)
    restart(training.engine, training.config, SINGLE)
    training.update(2)
    assert set(keys) == {1, 2, 3, 4}


def test_any_group_can_be_rewritten() -> None:
    """Not only B and A: what a layer's parameters become is up to the caller."""
    config = config_of()
    engine = DDPEngine(build_model(config), config.optim, SINGLE)
    named = dict(engine.module.named_parameters())
    names = ["model.layers.1.mlp.up_proj.V", "model.norm.weight"]
    before = [named[name].detach().clone() for name in names]
    group = [(name, tuple(named[name].shape)) for name in names]
    rewrite(engine, [group], lambda V, norm: (V * 2, norm + 1), SINGLE)
    assert torch.equal(named[names[0]], 2 * before[0])
    assert torch.equal(named[names[1]], before[1] + 1)
