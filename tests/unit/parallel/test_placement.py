"""Who holds and sends what, in closed form; that real engines do is tested in tests/distributed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config, TrainConfig
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.models.count import count_parameters, is_factor, parameter_shapes
from sltrain_dist.parallel.communication import Traffic, update_traffic
from sltrain_dist.parallel.placement import fsdp_rows
from tests.support.held_bytes import rank_bytes

REMAINDER, FACTORS = 32_776_704, 10_753_128
"""Parameters of llama_60m: embedding, head and norms; and the rest (by kind in tests/unit/models/test_model.py)."""


def config(preset: str = "llama_60m", **sections: dict[str, Any]) -> Config:
    return build_config({"preset": preset, **sections})


@pytest.mark.parametrize(
    "reparam",
    [
        {"method": "full"},
        {"method": "lowrank"},
        {"support": "random"},
        {"support": "stratified"},
        {"support": "blocks"},
        {"dense_layers": [0, -2]},
        {"method": "lowrank", "dense_layers": [3]},
    ],
)
@pytest.mark.parametrize("model", [{}, {"tie_head": True}, {"num_kv_heads": 2}])
def test_shapes_are_those_of_the_built_model(reparam: dict[str, Any], model: dict[str, Any]) -> None:
    settings = config(reparam=reparam, model=model)
    built = [(name, tuple(p.shape)) for name, p in build_meta_model(settings).named_parameters()]
    assert parameter_shapes(settings.model, settings.reparam) == built
    assert count_parameters(settings.model, settings.reparam).total == sum(math.prod(shape) for _, shape in built)


def test_factors_are_all_but_embedding_head_and_norms() -> None:
    settings = config()
    remainder = {name for name, _ in parameter_shapes(settings.model, settings.reparam) if not is_factor(name)}
    assert {name for name in remainder if "norm" not in name} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(remainder) == 2 + 2 * settings.model.num_layers + 1


@given(rows=st.integers(1, 500), ranks=st.integers(1, 64))
def test_fsdp_rows_cover_every_row_once(rows: int, ranks: int) -> None:
    held = [fsdp_rows(rows, rank, ranks) for rank in range(ranks)]
    assert held[0][0] == 0
    assert held[-1][1] == rows
    assert all(first <= last for first, last in held)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(held))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_states_and_keeps_the_remainder(stage: int) -> None:
    """In bf16 at 60m: 32.78M of the remainder whole, 10.75M of the factors in four parts."""
    held = rank_bytes(config(parallel={"engine": "zero", "zero_stage": stage}), 4, 0)
    shards = 2 * FACTORS // 4  # and the copy that DeepSpeed steps
    assert held.states == pytest.approx(4 * (REMAINDER + FACTORS / 4), rel=1e-6)
    weights = 2 * REMAINDER + (2 * shards if stage == 3 else 2 * FACTORS + shards)
    assert held.parameters == pytest.approx(weights, rel=1e-6)


@pytest.mark.parametrize(("preset", "ratio"), [("llama_60m", 0.75), ("llama_7b", 0.47)])
@pytest.mark.parametrize(
    "parallel",
    [
        {"engine": "ddp"},
        {"engine": "fsdp", "reshard_after_forward": False},  # else blocks are gathered twice, the rest once
        {"engine": "zero", "zero_stage": 2},
        {"engine": "zero", "zero_stage": 3},
    ],
)
def test_traffic_stands_as_the_parameters_do(preset: str, ratio: float, parallel: dict[str, Any]) -> None:
    ours = update_traffic(config(preset, parallel={"shard": "all", **parallel}), 8)
    full = update_traffic(config(preset, parallel={"shard": "all", **parallel}, reparam={"method": "full"}), 8)
    assert ours.total / full.total == pytest.approx(ratio, abs=0.005)


def test_traffic_by_hand() -> None:
    """One rank sends nothing; two ranks under ddp send a whole gradient each."""
    settings = config(train={"global_batch": 8, "micro_batch": 1, "dtype": "fp32"})
    assert update_traffic(settings, 1).total == 0
    assert update_traffic(settings, 2) == Traffic(all_reduce=4 * (REMAINDER + FACTORS))
    assert Traffic.of("all_gather", 80, 4) == Traffic(all_gather=60)


def test_where_gradients_wait() -> None:
    waits = {
        (engine, stage): config(parallel={"engine": engine, "zero_stage": stage}).parallel.accumulates_locally
        for engine, stage in (("ddp", 2), ("fsdp", 2), ("zero", 1), ("zero", 2), ("zero", 3))
    }
    assert {key for key, local in waits.items() if local} == {("ddp", 2), ("zero", 1)}
    assert config(parallel={"engine": "fsdp", "accumulate": "local"}).parallel.accumulates_locally


def test_which_blocks_are_recomputed() -> None:
    def chosen(**train: Any) -> list[int]:
        return [index for index in range(5) if TrainConfig(**train).is_recomputed(index)]

    assert chosen() == []
    assert chosen(activation_checkpointing="full") == [0, 1, 2, 3, 4]
    assert chosen(activation_checkpointing="selective", checkpoint_every=2) == [0, 2, 4]
    assert chosen(activation_checkpointing="selective", checkpoint_policy="attention") == [0, 1, 2, 3, 4]
    assert chosen(activation_checkpointing="selective", checkpoint_policy="ops") == [0, 1, 2, 3, 4]
