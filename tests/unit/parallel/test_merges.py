"""Restarts of relora: what they change, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sltrain_dist.config.schema import Config
from sltrain_dist.models.count import is_frozen
from sltrain_dist.parallel.whole_layers import restart
from sltrain_dist.sparse_lowrank.baselines import initial_A
from tests.support.ranks import SINGLE
from tests.unit.parallel.test_per_layer import Training
from tests.unit.parallel.test_whole_layers import config_of

LAYER = "model.layers.0.mlp.up_proj"


def relora(states: str = "all", **sections: dict[str, Any]) -> Config:
    return config_of(reparam={"method": "relora", "restart_states": states}, **sections)


def test_frozen_weights_change_at_restarts_alone() -> None:
    training = Training(relora())
    before = training.weights()
    after = training.update(2).weights()
    for name, weight in before.items():
        frozen = is_frozen(name, training.config.reparam)
        assert torch.equal(after[name], weight) == frozen, name
        assert any(key.startswith(f"optim.{name}.") for key in training.saved()) is not frozen, name
    assert sum(is_frozen(name, training.config.reparam) for name in before) == 14


@pytest.mark.parametrize("number", [1, 2])
def test_products_are_merged_and_factors_start_anew(number: int) -> None:
    training = Training(relora()).update(2)
    before, batch = training.weights(), torch.arange(32).view(2, 16)
    with torch.no_grad():
        logits = training.engine.module(batch)
    restart(training.engine, training.config, SINGLE, number)
    after = training.weights()
    for name, weight in after.items():
        layer, _, last = name.rpartition(".")
        if is_frozen(name, training.config.reparam):
            W, B, A = (before[f"{layer}.{key}"].double() for key in ("weight", "B", "A"))
            torch.testing.assert_close(weight.double(), W + 2.0 * B @ A, rtol=1e-6, atol=1e-7)
            assert not torch.equal(weight, before[name])
        elif last == "B":
            assert not weight.any()
        elif last == "A":
            drawn = initial_A(weight.shape[1], training.config.seed, layer, number).read(0, weight.numel())
            assert torch.equal(weight.flatten(), drawn)
        else:
            assert torch.equal(weight, before[name])
    with torch.no_grad():
        torch.testing.assert_close(training.engine.module(batch), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("update", ["whole", "per_layer"])
def test_states_of_the_factors_alone(update: str) -> None:
    training = Training(relora("factors", optim={"update": update})).update(2)
    before = training.saved()
    restart(training.engine, training.config, SINGLE)
    after = training.saved()
    for name, state in before.items():
        if name.startswith("optim."):
            is_factor = name.rpartition(".")[0].endswith((".B", ".A"))
            assert torch.equal(after[name], torch.zeros_like(state) if is_factor else state), name
    training.update(1)
    assert f"optim.{LAYER}.B.exp_avg" in training.saved()
