"""optim/restarts.py: when restarts are made, and what the learning rate is after them."""

from __future__ import annotations

import pytest

from sltrain_dist.config.schema import ReparamConfig
from sltrain_dist.optim.restarts import (
    last_restart,
    learning_rate_share,
    restart_is_due,
    states_cleared_at,
)

FOUR = ReparamConfig(restart_every=4, restart_warmup=2)


def test_every_k_updates_but_not_before_the_first() -> None:
    assert [step for step in range(13) if restart_is_due(FOUR, step)] == [4, 8, 12]
    assert not any(restart_is_due(ReparamConfig(), step) for step in range(13))


def test_a_restart_belongs_to_the_update_after_it() -> None:
    """At a checkpoint of update 8, the restart of update 8 has not been made."""
    assert [last_restart(FOUR, step) for step in range(13)] == [0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]
    assert {last_restart(ReparamConfig(), step) for step in range(13)} == {0}


def test_it_agrees_with_a_count() -> None:
    for every in (1, 2, 3, 7):
        reparam, restarted = ReparamConfig(restart_every=every), 0
        for step in range(1, 30):
            restarted = step - 1 if restart_is_due(reparam, step - 1) else restarted  # before update number `step`
            assert last_restart(reparam, step) == restarted


def test_the_learning_rate_comes_back() -> None:
    shares = [learning_rate_share(FOUR, step) for step in range(10)]
    assert shares == pytest.approx([1, 1, 1, 1, 0.001, 0.5005, 1, 1, 0.001, 0.5005])
    assert shares[6] == 1.0  # exactly
    none = ReparamConfig(restart_every=4)
    assert {learning_rate_share(none, step) for step in range(10)} == {1.0}
    assert {learning_rate_share(ReparamConfig(), step) for step in range(10)} == {1.0}


def test_whose_states_are_cleared() -> None:
    factors = FOUR.model_copy(update={"restart_states": "factors"})
    layer = "model.layers.0.mlp.up_proj"
    names = [f"{layer}.B", f"{layer}.A", f"{layer}.V", "model.norm.weight", "model.embed_tokens.weight"]
    assert [states_cleared_at(FOUR, name, 7) for name in names] == [4] * 5
    assert [states_cleared_at(factors, name, 7) for name in names] == [4, 4, 0, 0, 0]
