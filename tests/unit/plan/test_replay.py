"""plan/replay.py: fake tensors take what real ones take, and every byte has its component."""

from __future__ import annotations

import gc
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sltrain_dist.config.load import build_config, merged
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.events import EventLog
from sltrain_dist.memory.result import Point
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.parallel.placement import accumulated_gradient_bytes
from sltrain_dist.plan.follow import follow
from sltrain_dist.plan.replay import fake_rank, replayed_timeline
from sltrain_dist.sparse_lowrank.sizes import stored_index_bytes
from sltrain_dist.train.build import build_engine
from sltrain_dist.train.dry_run import made_up_rows
from sltrain_dist.train.step import forward_backward
from tests.support.configs import PLANNED
from tests.support.held_bytes import RankBytes, rank_bytes
from tests.support.ranks import SINGLE

pytestmark = pytest.mark.slow


def config_of(**sections: Any) -> Config:
    """A small model; sections are merged into its own."""
    return build_config(merged(PLANNED, {**sections, "parallel": {"engine": "ddp", **sections.get("parallel", {})}}))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"train": {"global_batch": 6}, "optim": {"clip": 1.0}},
    "blocks, per layer": {
        "reparam": {"support": "blocks", "path": "factored"},
        "optim": {"update": "per_layer", "state_bits": 8, "clip": 1.0},
    },
    "two passes": {"optim": {"update": "per_layer", "clip": 1.0, "clip_mode": "two_pass", "state_bits": 32}},
    "stratified, all again": {
        "reparam": {"support": "stratified", "path": "materialize", "row_block_bytes": 4096},
        "train": {"dtype": "mixed", "activation_checkpointing": "full"},
        "optim": {"state_bits": 4},
    },
    "attention kept": {
        "train": {"activation_checkpointing": "selective", "checkpoint_policy": "attention", "loss_chunk_tokens": 7},
        "optim": {"master_weights": True, "state_bits": 4},
    },
    "galore": {"reparam": {"method": "galore"}, "train": {"global_batch": 4}, "optim": {"state_bits": 8}},
    "full rank": {
        "reparam": {"method": "full"},
        "train": {"dtype": "fp32", "loss_chunk_tokens": 0},
        "optim": {"name": "adafactor"},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_fake_tensors_take_what_real_ones_take(case: str) -> None:
    """At every module of the step, in every component, to the byte."""
    config = config_of(**CASES[case])
    fake, real = replayed_timeline(config, device="cpu"), follow(config, SINGLE)
    assert [(p.phase, p.where) for p in fake] == [(p.phase, p.where) for p in real]
    # But for the stretch in which initial values are computed, which fake tensors have none of.
    assert fake[1:] == real[1:]
    assert {point.phase for point in fake} == {"init", "forward", "backward", "update", "save"}


PLAIN: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"train": {"global_batch": 4, "activation_checkpointing": "full"}, "optim": {"clip": 1.0}}),
    "per layer": (1, {"optim": {"update": "per_layer", "state_bits": 32}, "reparam": {"support": "blocks"}}),
    # Whose peak is at the reduction of a block: few tokens, large gradients.
    "fsdp": (2, {"parallel": {"engine": "fsdp"}, "reparam": {"method": "full"}, "data": {"seq_len": 4}}),
    "fsdp, per layer": (2, {"parallel": {"engine": "fsdp", "shard": "all"}, "optim": {"update": "per_layer"}}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_following_does_not_change_what_is_followed(case: str) -> None:
    """The same training without hooks, scopes and patches: none of them holds a tensor, or lets go of one."""
    ranks, sections = PLAIN[case]
    config = config_of(**{**sections, "train": {"global_batch": 2 * ranks, **sections.get("train", {})}})
    timeline = replayed_timeline(config, ranks, device="cpu")
    peak = max(point.total for point in timeline if point.phase not in ("init", "save"))
    model, log = build_meta_model(config), EventLog("cpu")
    with fake_rank(config, 0, ranks, "cpu") as env:
        with log:
            engine = build_engine(model, config, env)
        for _ in range(2):
            gc.collect()
            log.begin("update")
            with log:
                engine.begin_update(config.optim.lr, 1.0)
                forward_backward(engine, made_up_rows(config, 0, config.train.global_batch // ranks), 2, env)
                engine.clip_gradients()
                engine.update()
    assert sum(log.moments()[-1].components.values()) == peak


def test_layers_of_a_preset_take_what_they_take() -> None:
    config = build_config(
        {
            "preset": "llama_60m",
            "model": {"num_layers": 2},
            "parallel": {"engine": "ddp"},
            "train": {"micro_batch": 1, "global_batch": 1},
        }
    )
    assert replayed_timeline(config, device="cpu")[1:] == follow(config, SINGLE)[1:]


HELD: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp on 2": (2, {}),
    "fsdp on 1": (1, {"parallel": {"engine": "fsdp"}}),
    "fsdp on 64": (64, {"parallel": {"engine": "fsdp"}, "optim": {"state_bits": 8}}),
    "all on 4": (4, {"parallel": {"engine": "fsdp", "shard": "all"}, "reparam": {"support": "blocks"}}),
    "replicas": (8, {"parallel": {"engine": "fsdp", "replicas": 2}, "optim": {"master_weights": True}}),
    "local": (2, {"parallel": {"engine": "fsdp", "accumulate": "local"}, "train": {"dtype": "mixed"}}),
    "per layer": (4, {"parallel": {"engine": "fsdp"}, "optim": {"update": "per_layer"}}),
}


@cache
def replayed(case: str) -> tuple[Config, int, dict[tuple[str, str], dict[str, int]]]:
    """Configuration and ranks of a case of `HELD`, and the components of a rank by phase and place."""
    ranks, sections = HELD[case]
    config = config_of(**{**sections, "train": {**sections.get("train", {}), "global_batch": 4 * ranks}})
    points = replayed_timeline(config, ranks)
    return config, ranks, {(point.phase, point.where): point.groups() for point in points}


@pytest.mark.parametrize("case", HELD)
def test_components_follow_the_sharding_rules(case: str) -> None:
    config, ranks, points = replayed(case)
    before = points["update", "clipping"]
    held = RankBytes(
        sum(before[group] for group in ("factors", "sparse_values", "dense")),
        before.get("gradients", 0),
        before["states"] + before.get("master_weights", 0),
    )
    rotary = 4 * 2 * config.data.seq_len * config.model.head_dim
    expected = rank_bytes(config, ranks, 0)
    assert asdict(held) == {**asdict(expected), "parameters": expected.parameters + rotary}
    if config.reparam.support == "random":
        shapes = ((64, 64), (160, 64), (64, 160))
        layer = [stored_index_bytes(m, n, 0.1, "random") for m, n in shapes]
        assert before["index"] == 2 * (4 * layer[0] + 2 * layer[1] + layer[2])
    assert set(points["save", "checkpoint"]) <= {
        "factors", "sparse_values", "dense", "index", "states", "master_weights", "temporaries", "gradients", "buffers",
    }  # fmt: skip


@pytest.mark.parametrize("case", ["fsdp on 1", "local"])
def test_gradients_wait_for_the_last_micro_batch(case: str) -> None:
    config, ranks, points = replayed(case)
    assert points["forward", "pass 2, embed_tokens"]["gradients"] == accumulated_gradient_bytes(config, ranks)


def peak(timeline: tuple[Point, ...], phase: str) -> dict[str, int]:
    """The components at the moment of a phase that takes most."""
    return max((point for point in timeline if point.phase == phase), key=lambda point: point.total).groups()


def test_gathered_blocks_and_what_is_saved() -> None:
    """FSDP2 keeps gathered blocks where it is told to, and activation checkpointing keeps a block's input."""
    base: dict[str, Any] = {"reparam": {"method": "full"}, "model": {"num_layers": 4}}
    kept, freed, again = (
        peak(replayed_timeline(config_of(**base, **sections), 1), "forward")
        for sections in (
            {"parallel": {"engine": "fsdp", "reshard_after_forward": False}},
            {"parallel": {"engine": "fsdp"}},
            {"parallel": {"engine": "fsdp"}, "train": {"activation_checkpointing": "full"}},
        )
    )
    assert kept["buffers"] > 1.5 * freed["buffers"] > 0
    assert again["activations"] < freed["activations"] / 3


def test_a_gpu_takes_other_paths() -> None:
    """The kernels there arrange tokens in their own way; what is held stays the same."""
    config = config_of(reparam={"support": "blocks", "path": "factored"})
    cpu, cuda = (peak(replayed_timeline(config, device=device), "backward") for device in ("cpu", "cuda"))
    assert cuda["temporaries"] != cpu["temporaries"]
    assert {k: v for k, v in cuda.items() if k in ("factors", "dense", "index")} == {
        k: v for k, v in cpu.items() if k in ("factors", "dense", "index")
    }


@pytest.mark.parametrize(
    ("sections", "ranks", "says"),
    [
        ({"parallel": {"engine": "zero"}}, 1, "without --replay"),
        ({"parallel": {"engine": "fsdp", "cpu_offload": True}}, 1, "cpu_offload"),
        ({}, 3, "train.global_batch"),
        ({"parallel": {"engine": "fsdp", "replicas": 2}, "train": {"global_batch": 4}}, 2, "parallel.replicas"),
        ({}, 0, "rank"),
    ],
    ids=str,
)
def test_what_cannot_be_replayed(sections: dict[str, Any], ranks: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replayed_timeline(config_of(**sections), ranks)
    assert not dist.is_initialized() and torch._C._len_torch_dispatch_stack() == 0
