"""memory/record.py, ledger.py and the schedules: what is recorded once and played is what whole models take."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sltrain_dist.config.load import build_config, merged
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.result import Estimate
from sltrain_dist.plan.replay import replay

pytestmark = pytest.mark.slow

WIDE: dict[str, Any] = {
    "preset": "llama_1b",
    "model": {"num_layers": 2, "vocab_size": 512},
    "data": {"seq_len": 256},
    "optim": {"name": "sgd", "clip": 0.0},  # no states: what is compared are the passes
    "parallel": {"engine": "ddp"},
    "eval": {"source": None},
    "train": {"micro_batch": 1, "global_batch": 1},
}
"""Two layers of the 1B model, at their real width."""

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lowrank": {"method": "lowrank"},
    "random, materialize": {"support": "random", "path": "materialize"},
    "random, factored": {"support": "random", "path": "factored"},
    "stratified, auto": {"support": "stratified", "path": "auto"},
    "blocks, factored": {"support": "blocks", "path": "factored"},
}


def peaks(found: Estimate) -> tuple[int, int]:
    """Most bytes of a forward and of a backward pass."""
    return found.peak_of("forward").total, found.peak_of("backward").total


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_passes_at_real_width_are_those_of_a_replay(method: str, recompute: str, dtype: str, micro_batch: int) -> None:
    """To the byte."""
    train = {"activation_checkpointing": recompute, "dtype": dtype}
    train |= {"micro_batch": micro_batch, "global_batch": micro_batch}
    config = build_config(merged(WIDE, {"reparam": METHODS[method], "train": train}))
    assert peaks(estimate(config)) == peaks(replay(config))


DRAWN: dict[str, tuple[Any, ...]] = {
    "reparam.method": ("sltrain", "sltrain", "sltrain", "full", "lowrank"),
    "reparam.support": ("random", "stratified", "blocks"),
    "reparam.weight_bits": (16, 16, 8),
    "reparam.path": ("auto", "materialize", "factored"),
    "reparam.row_block_bytes": (None, 1 << 21),
    "data.reset_attention": (False, True),
    "data.seq_len": (100, 128, 256),
    "model.num_kv_heads": (None, None, 8),
    "model.tie_head": (False, True),
    "optim.state_bits": (32, 16, 8, 4),
    "optim.update": ("whole", "per_layer"),
    "train.dtype": ("bf16", "fp32", "mixed"),
    "train.micro_batch": (1, 3),
    "train.activation_checkpointing": ("none", "full", "selective"),
    "train.checkpoint_policy": ("blocks", "attention", "ops"),
    "train.loss_chunk_tokens": (None, 0, 50),
    "reparam.dense_layers": ((), (0,), (1, -1)),
}
"""Settings, and what they are drawn from; what stands there twice comes twice as often."""

_SCALARS = 256
"""Bytes of norms that per-layer updates add up, a few for each parameter."""


def draw(seed: int) -> Config:
    """A configuration that can be run, always the same of a seed."""
    rng = random.Random(seed)
    while True:
        values: dict[str, Any] = {"optim": {"name": "adamw", "clip": 0.0}, "data": {"batching": "pack"}}
        for key, choices in DRAWN.items():
            section, _, name = key.partition(".")
            values.setdefault(section, {})[name] = rng.choice(choices)
        values["train"]["global_batch"] = values["train"]["micro_batch"] * rng.choice((1, 2))
        try:
            return build_config(merged({**WIDE, "model": {"num_layers": 3, "vocab_size": 512}}, values))
        except ConfigError:
            continue


@pytest.mark.parametrize("seed", range(8))
def test_drawn_configurations_are_as_their_replay(seed: int) -> None:
    config = draw(seed)
    found, expected = estimate(config), replay(config)
    assert peaks(found) == pytest.approx(peaks(expected), rel=0, abs=_SCALARS)
    update = found.peak_of("update").total - found.peak_of("update").components["temporaries.scalars"]
    assert update == pytest.approx(expected.peak_of("update").total, rel=0, abs=4096)


def test_components_at_the_peak_are_those_of_a_replay() -> None:
    config = build_config(merged(WIDE, {"reparam": METHODS["blocks, factored"], "optim": {"name": "adamw"}}))
    found, expected = (result.peak_of("backward").groups() for result in (estimate(config), replay(config)))
    scalars = 1 << 17  # and the rotary table in bf16, which a replay puts to no module
    assert {g: s for g, s in found.items() if s > scalars} == pytest.approx(
        {g: s for g, s in expected.items() if s > scalars}, rel=0, abs=scalars
    )
