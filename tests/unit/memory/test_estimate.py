"""memory/estimate.py: exact where the rules are, close to replays elsewhere, moved by the fields that say so."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from sltrain_dist.config.load import build_config, merged
from sltrain_dist.config.schema import MEMORY, Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.result import Estimate
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.models.count import model_flops_per_token
from sltrain_dist.parallel.communication import update_traffic
from sltrain_dist.plan.replay import replay
from tests.support.configs import PLANNED
from tests.support.held_bytes import rank_bytes


def config_of(values: dict[str, Any], base: dict[str, Any] = PLANNED) -> Config:
    """A small model, with some values of its own."""
    return build_config(merged(base, values))


def at_update(found: Estimate) -> dict[str, int]:
    """Bytes by group between the backward pass and the update."""
    return found.phases()["update"].groups()


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp, factors": {"engine": "fsdp"},
    "fsdp, all": {"engine": "fsdp", "shard": "all"},
    **{
        f"zero {stage}, {shard}": {"engine": "zero", "zero_stage": stage, "shard": shard}
        for stage in (1, 2, 3)
        for shard in ("factors", "all")
    },
}


class TestExact:
    """`rank_bytes` is compared with the tensors of every engine by tests/distributed."""

    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_what_the_rank_that_needs_most_holds(self, engine: str, ranks: int, dtype: str) -> None:
        train = {"dtype": dtype, "global_batch": 8}
        config = config_of({"parallel": ENGINES[engine], "train": train, "optim": {"weight_decay": 0.1}})
        found = at_update(estimate(config, ranks=ranks))
        every = [rank_bytes(config, ranks, rank) for rank in range(ranks)]
        rotary = 8 * config.data.seq_len * config.model.head_dim
        held = sum(found.get(group, 0) for group in ("factors", "sparse_values", "dense"))
        held += estimate(config, ranks=ranks).phases()["update"].components.get("buffers.partition", 0)
        assert held - rotary == max(rank.parameters for rank in every)
        assert found["states"] == max(rank.states for rank in every)
        assert found["gradients"] == max(rank.gradients for rank in every)

    @pytest.mark.parametrize("bits", [32, 8, 4])
    @pytest.mark.parametrize("masters", [False, True])
    def test_states_of_all_forms(self, bits: int, masters: bool) -> None:
        optim = {"state_bits": bits, "master_weights": masters}
        for engine in ("ddp", "fsdp"):
            values = {"optim": optim, "parallel": {"engine": engine, "shard": "all"}, "train": {"global_batch": 4}}
            config = config_of(values)
            found = at_update(estimate(config, ranks=2))
            assert found["states"] + found.get("master_weights", 0) == rank_bytes(config, 2, 0).states
            assert ("master_weights" in found) is masters

    @pytest.mark.parametrize("method", ["cola", "relora", "galore", "apollo", "apollo-mini"])
    def test_baselines(self, method: str) -> None:
        """Frozen weights have neither gradients nor states, and states of projected gradients other shapes."""
        reparam = {"method": method, "restart_every": 9 if method == "relora" else 0}
        config = config_of({"reparam": reparam, "train": {"global_batch": 4}})
        for ranks in (1, 2):
            points = [point.groups() for point in estimate(config, ranks=ranks).timeline if point.phase == "update"]
            expected = rank_bytes(config, ranks, 0)
            assert points[0]["states"] == expected.states
            assert points[0]["gradients"] == expected.gradients
        assert estimate(config).parameters == sum(p.numel() for p in build_meta_model(config).parameters())

    @pytest.mark.parametrize("support", ["random", "stratified", "blocks"])
    def test_the_index(self, support: str) -> None:
        config = config_of({"reparam": {"support": support}})
        buffers = build_meta_model(config).named_buffers()
        expected = sum(buffer.nbytes for name, buffer in buffers if ".support." in name)
        assert at_update(estimate(config)).get("index", 0) == expected

    def test_parameters_and_traffic(self) -> None:
        config = config_of({"parallel": {"engine": "fsdp"}, "train": {"global_batch": 8}})
        found = estimate(config, ranks=4)
        assert found.parameters == sum(p.numel() for p in build_meta_model(config).parameters())
        assert found.comm_bytes_per_update == round(update_traffic(config, 4).total) > 0


_LARGE_LAYERS: Values = {
    "model": {"intermediate_size": 512},
    "reparam": {"method": "full"},
    "data": {"seq_len": 4},
    "train": {"dtype": "mixed", "global_batch": 16},
}
_DENSE_LAYERS: Values = {
    "model": {"num_layers": 5},
    "reparam": {"dense_layers": [2, -1]},
    "data": {"seq_len": 4},
    "parallel": {"engine": "fsdp"},
    "train": {"global_batch": 16},
}
COMPARED: dict[str, tuple[int, dict[str, Any]]] = {
    "accumulation, restarts": (
        1,
        {"reparam": {"path": "materialize", "restart_every": 9}, "train": {"global_batch": 4}},
    ),
    "ddp, per layer": (
        2,
        {"optim": {"update": "per_layer", "stochastic_rounding": True}, "train": {"global_batch": 4}},
    ),
    "fsdp, restarts": (
        4,
        {
            "reparam": {"restart_every": 9},
            "parallel": {"engine": "fsdp", "prefetch_blocks": 2},
            "optim": {"clip": 1.0},
            "train": {"global_batch": 8},
        },
    ),
    "fsdp of all, mixed": (
        4,
        {
            "parallel": {"engine": "fsdp", "shard": "all", "accumulate": "local", "replicas": 2},
            "train": {"dtype": "mixed", "global_batch": 16},
        },
    ),
    # Layers that are large beside their tokens: the peaks are at their gathers and reductions.
    "fsdp of casts": (2, {**_LARGE_LAYERS, "parallel": {"engine": "fsdp", "prefetch_blocks": 2}}),
    "fsdp, accumulated whole": (
        2,
        {**_LARGE_LAYERS, "parallel": {"engine": "fsdp", "accumulate": "local", "reshard_after_forward": False}},
    ),
    "dense layers, restarts": (
        2,
        {
            "model": {"num_layers": 3},
            "reparam": {"path": "materialize", "dense_layers": [0], "restart_every": 9},
            "train": {"global_batch": 4},
        },
    ),
    "dense layers, ddp, per layer": (
        2,
        {
            "model": {"num_layers": 3},
            "reparam": {"dense_layers": [1]},
            "optim": {"update": "per_layer"},
            "train": {"global_batch": 4, "activation_checkpointing": "selective"},
        },
    ),
    "fsdp, dense layers": (2, _DENSE_LAYERS),
    "fsdp, dense layers, mixed": (
        2,
        merged(_DENSE_LAYERS, {"parallel": {"prefetch_blocks": 2}, "train": {"dtype": "mixed"}}),
    ),
    "fsdp, dense layers, accumulated whole": (
        2,
        merged(_DENSE_LAYERS, {"parallel": {"accumulate": "local", "reshard_after_forward": False}}),
    ),
    "relora": (1, {"reparam": {"method": "relora", "restart_every": 9}, "train": {"global_batch": 4}}),
    "galore, ddp, per layer": (
        2,
        {
            "reparam": {"method": "galore"},
            "optim": {"update": "per_layer", "state_bits": 8},
            "train": {"global_batch": 4},
        },
    ),
    "apollo": (1, {"reparam": {"method": "apollo"}, "optim": {"state_bits": 32}}),
    "muon of dense layers, fp32": (
        1,
        {
            "reparam": {"method": "full"},
            "optim": {"factors": "muon", "newton_schulz": "fp32"},
            "train": {"dtype": "fp32"},
        },
    ),
    "ddp, muon": (
        2,
        {
            "reparam": {"dense_layers": [0]},
            "optim": {"factors": "muon", "stochastic_rounding": True},
            "train": {"global_batch": 4},
        },
    ),
    "ddp, spectron of wide factors": (
        2,
        {
            "model": {"hidden_size": 128, "intermediate_size": 320},
            "reparam": {"rank": 48},
            "optim": {"factors": "spectron", "state_bits": 8},
            "train": {"global_batch": 4},
        },
    ),
    "fsdp, muon": (
        4,
        {
            "optim": {"factors": "muon", "master_weights": True, "state_bits": 32},
            "parallel": {"engine": "fsdp", "replicas": 2},
            "train": {"global_batch": 8},
        },
    ),
    "fsdp of all, spectron, mixed": (
        4,
        {
            "reparam": {"rank": 48},
            "optim": {"factors": "spectron"},
            "parallel": {"engine": "fsdp", "shard": "all"},
            "train": {"dtype": "mixed", "global_batch": 8},
        },
    ),
    "fsdp on one rank": (1, {**_LARGE_LAYERS, "parallel": {"engine": "fsdp"}}),
}
"""(ranks, values): engines' schedules. What is recorded is compared by tests/unit/memory/test_record.py."""

_SCALARS = 2048
"""Bytes of sums, counters and norms, of a few values each, that recordings leave out."""


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPARED)
def test_it_is_what_a_replay_takes(case: str) -> None:
    ranks, values = COMPARED[case]
    config = config_of(values)
    found, expected = estimate(config, ranks=ranks).phases(), replay(config, ranks).phases()
    assert list(found) == list(expected)
    rotary = 8 * config.data.seq_len * config.model.head_dim  # whose table a GPU's host computes
    for phase, point in expected.items():
        off = 64 if phase in ("forward", "backward") else _SCALARS + (rotary if phase == "init" else 0)
        assert abs(found[phase].total - point.total) <= off, phase
    for group in ("gradients", "states", "master_weights", "index"):
        assert found["update"].groups().get(group) == expected["update"].groups().get(group)


def test_one_rank_moves_and_casts_one_offloaded_parameter_at_a_time() -> None:
    """Replays do not know offloading: here are the allocations of FSDP2's `wait_for_unshard` in their order."""
    parallel = {"engine": "fsdp", "cpu_offload": True, "shard": "all"}
    config = config_of(merged(_LARGE_LAYERS, {"parallel": parallel, "optim": {"state_bits": 32}}))
    points = {p.where: p.components["buffers.gathered"] for p in estimate(config).timeline if p.phase == "forward"}
    parameters = list(build_meta_model(config).named_parameters())
    root = [4 * p.numel() for name, p in parameters if ".layers." not in name]
    live = peak = cast = 0
    for size in root:  # is not cast: the copy on the device is copied out
        peak = max(peak, live + cast + size, live + 2 * size)
        live, cast = live + size, size
    assert points["root, gathered"] == peak
    live, cast = sum(root), 0
    for size in (2 * p.numel() for name, p in parameters if ".layers.0." in name):
        peak = max(peak, live + cast + 2 * size + size, live + size + size)
        live, cast = live + size, size
    assert points["layer 0, gathered"] == peak


@pytest.mark.slow
def test_one_optimizer_updates_what_is_int8_and_what_is_not() -> None:
    """Plain fp32 parameters, here a large embedding, would else be updated in place."""
    model = {"vocab_size": 4096, "tie_head": True}
    config = config_of(
        {"model": model, "reparam": {"weight_bits": 8}, "optim": {"state_bits": 32}, "train": {"dtype": "fp32"}}
    )
    found, expected = (one.peak_of("update").total for one in (estimate(config), replay(config)))
    assert abs(found - expected) < 0.001 * expected


@pytest.mark.slow
def test_components_at_the_peak_are_those_of_a_replay() -> None:
    config = config_of(
        {"reparam": {"path": "materialize"}, "data": {"seq_len": 128}, "train": {"loss_chunk_tokens": 32}}
    )
    found, expected = (result.phases()["backward"].groups() for result in (estimate(config), replay(config)))
    assert set(found) == set(expected)
    total = sum(expected.values())
    assert all(abs(found[group] - expected[group]) < 0.03 * total for group in expected)


@pytest.mark.parametrize("method", ["sltrain", "lowrank"])
def test_a_restart_of_wide_layers(method: str) -> None:
    """Each matrix of the decompositions is counted, and each layer's operations."""
    reparam = {"method": method, "rank": 64, "restart_every": 9, "dense_layers": [-1]}
    config = config_of({"reparam": reparam, "model": {"num_layers": 3}})
    r, shapes = 64, 2 * [*(4 * [(64, 64)]), (160, 64), (160, 64), (64, 160)]
    found = estimate(config)
    m, n = 160, 64
    held = found.peak_of("restart").components["temporaries.restart"]
    # The factors, the Q of both and the new factors, in float32; R of both, their product, U and V, and vectors.
    assert 4 * (3 * (m + n) * r + 5 * r * r) < held < 4 * (3 * (m + n) * r + 6 * r * r)
    qr = sum(4 * rows * r * r - 4 * r**3 // 3 for shape in shapes for rows in shape)
    products = sum(2 * r**3 + 2 * (m + n) * r * r for m, n in shapes)
    assert found.restart_flops == pytest.approx(qr + products + len(shapes) * 22 * r**3, rel=1e-6)
    assert estimate(config_of({"reparam": {**reparam, "restart_every": 0}})).restart_flops == 0


class TestFlops:
    def test_of_a_dense_model(self) -> None:
        config = config_of({"reparam": {"method": "full"}})
        model, length = config.model, config.data.seq_len
        dense = model_flops_per_token(model, length)
        per_layer = model.num_layers * model.hidden_size * length
        # Attention's causal half, and its backward pass of five products instead of four.
        assert estimate(config).flops_per_token == dense - 12 * per_layer + 7 * per_layer

    def test_recomputation_is_a_forward_pass_of_the_blocks(self) -> None:
        without = config_of({"reparam": {"method": "full"}})
        again = config_of({"reparam": {"method": "full"}, "train": {"activation_checkpointing": "full"}})
        model = without.model
        head = 6 * model.vocab_size * model.hidden_size
        attention = 7 * model.num_layers * model.hidden_size * without.data.seq_len
        weights = estimate(without).flops_per_token - head - attention
        difference = estimate(again).flops_per_token - estimate(without).flops_per_token
        # It stops where nothing more is needed: before the last product, down_proj.
        last = 2 * model.num_layers * model.hidden_size * model.intermediate_size
        assert difference == weights // 3 + attention * 2 // 7 - last

    def test_two_passes_take_twice_as_many(self) -> None:
        optim = {"update": "per_layer", "clip": 1.0}
        once = config_of({"optim": {**optim, "clip_mode": "previous_norm"}})
        twice = config_of({"optim": {**optim, "clip_mode": "two_pass"}})
        assert estimate(twice).flops_per_token == 2 * estimate(once).flops_per_token


def test_a_number_of_ranks_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        estimate(config_of({}), ranks=3)


def test_an_evaluation_of_larger_batches_counts() -> None:
    small, large = ({"eval": {"source": "embedded", "micro_batch": size}} for size in (2, 512))
    assert estimate(config_of(large)).peak.where.startswith("evaluation")
    assert estimate(config_of(large)).peak_bytes > 2 * estimate(config_of(small)).peak_bytes


def test_an_evaluation_of_dense_layers() -> None:
    """Every layer takes what it takes in a model of layers like it."""

    def mlp_bytes(reparam: dict[str, Any]) -> list[int]:
        reparam = {"path": "factored", **reparam}
        config = config_of({"model": {"num_layers": 3}, "reparam": reparam, "eval": {"source": "embedded"}})
        points = [point for point in estimate(config).timeline if point.where == "evaluation, mlp"]
        return [point.components["temporaries.mlp"] for point in points]

    none, dense = mlp_bytes({}), mlp_bytes({"method": "full"})
    assert none[1] != dense[1]
    assert mlp_bytes({"dense_layers": [1]}) == [none[0], dense[1], none[2]]


# Which fields matter

Values = dict[str, Any]
_PLANNEDEST = merged(PLANNED, {"model": {"num_layers": 1}})
_FSDP: Values = {"parallel": {"engine": "fsdp"}, "train": {"global_batch": 8}}
_ZERO: Values = {"parallel": {"engine": "zero", "zero_stage": 2}, "train": {"dtype": "fp32", "global_batch": 8}}
_AGAIN: Values = {"micro_batch": 8, "global_batch": 8, "activation_checkpointing": "selective"}
_LAYERS: Values = {"model": {"num_layers": 4}, "train": _AGAIN}
_WIDE: Values = {
    "model": {"num_layers": 1, "hidden_size": 128, "intermediate_size": 320},
    "reparam": {"path": "materialize", "rank": 4, "density": 0.02},
}

MOVES: dict[str, tuple[Values, Any]] = {
    "model.vocab_size": ({}, 192),
    "model.hidden_size": ({}, 128),
    "model.intermediate_size": ({}, 256),
    "model.num_layers": ({}, 2),
    "model.num_heads": ({"data": {"seq_len": 128}, "train": {"micro_batch": 8, "global_batch": 8}}, 16),
    "model.num_kv_heads": ({"train": {"micro_batch": 8, "global_batch": 8}}, 1),
    "model.tie_head": ({}, True),
    "reparam.method": ({}, "full"),
    "reparam.dense_layers": ({"model": {"num_layers": 2}}, [0]),
    "reparam.rank": ({}, 16),
    "reparam.density": ({}, 0.3),
    "reparam.support": ({}, "blocks"),
    "reparam.path": ({"reparam": {"support": "blocks"}, "data": {"seq_len": 64}}, "materialize"),
    "reparam.row_block_bytes": (_WIDE, 16384),
    "reparam.weight_bits": ({}, 8),
    "reparam.restart_every": (
        {
            "model": {"hidden_size": 128, "intermediate_size": 320},
            "reparam": {"rank": 64},
            "data": {"seq_len": 2},
            "optim": {"name": "sgd", "update": "per_layer"},
            "train": {"micro_batch": 1, "global_batch": 1},
        },
        9,
    ),
    "data.seq_len": ({}, 64),
    "data.reset_attention": ({"data": {"batching": "pack", "seq_len": 64}}, True),
    "optim.name": ({}, "sgd"),
    "optim.state_bits": ({"model": {"vocab_size": 512}}, 32),
    "optim.stochastic_rounding": ({"model": {"vocab_size": 2048}, "optim": {"update": "per_layer"}}, True),
    "optim.master_weights": ({}, True),
    "optim.weight_decay": (
        {"optim": {"name": "sgd"}, "data": {"seq_len": 2}, "train": {"micro_batch": 1, "global_batch": 1}},
        0.1,
    ),
    "optim.update": ({}, "per_layer"),
    "optim.factors": ({}, "muon"),
    "optim.newton_schulz": (  # chunks of the momentum are smaller than these matrices
        {
            "model": {"hidden_size": 1024, "intermediate_size": 4096},
            "reparam": {"method": "full"},
            "optim": {"factors": "muon"},
            "data": {"seq_len": 2},
            "train": {"micro_batch": 1, "global_batch": 1},
        },
        "fp32",
    ),
    "parallel.engine": ({"train": {"global_batch": 8}}, "fsdp"),
    "parallel.shard": (_FSDP, "all"),
    "parallel.accumulate": ({**_FSDP, "train": {"global_batch": 16}}, "local"),
    "parallel.replicas": (_FSDP, 2),
    "parallel.reshard_after_forward": ({**_FSDP, "model": {"num_layers": 3}}, False),
    "parallel.prefetch_blocks": ({**_FSDP, "model": {"num_layers": 3}}, 2),
    "train.micro_batch": ({}, 1),
    "train.global_batch": ({}, 8),
    "train.dtype": ({}, "fp32"),
    "train.activation_checkpointing": (
        {"model": {"num_layers": 3}, "train": {"micro_batch": 8, "global_batch": 8}},
        "full",
    ),
    "train.checkpoint_policy": (_LAYERS, "attention"),
    "train.checkpoint_every": (_LAYERS, 4),
    "train.loss_chunk_tokens": ({"model": {"vocab_size": 2048}}, 4),
}
"""By field: what else is set, and a value other than the default, which moves the peak."""

NOT_REPLAYED: dict[str, tuple[Values, Any]] = {
    "parallel.zero_stage": (_ZERO, 3),
    "parallel.cpu_offload": (_ZERO, True),
    "parallel.deepspeed": (_ZERO, {"zero_optimization": {"reduce_bucket_size": 5000}}),
    "eval.source": ({"eval": {"micro_batch": 512}}, "embedded"),
    "eval.micro_batch": ({"eval": {"source": "embedded"}}, 512),
}
"""What replays do not know: ZeRO, the host's memory, and evaluations."""


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(dotted key, whether it says that it matters) of every field."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{name}.")
        else:
            yield f"{prefix}{name}", MEMORY in field.metadata


def ranks_of(config: Config) -> int:
    """Several where the engine shards."""
    return 1 if config.parallel.engine == "ddp" else 4


def with_value(values: Values, key: str, value: Any) -> Values:
    """Values with one more."""
    section, _, name = key.partition(".")
    return merged(values, {section: {name: value}})


@functools.cache
def replayed(values: str) -> int:
    """Peak of a replay, by its values as JSON: several fields share what else is set."""
    config = config_of(json.loads(values), _PLANNEDEST)
    return replay(config, ranks_of(config)).peak_bytes


def estimated(values: Values) -> int:
    config = config_of(values, _PLANNEDEST)
    return estimate(config, ranks=ranks_of(config)).peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("key", MOVES)
def test_a_field_moves_the_estimate(key: str) -> None:
    others, value = MOVES[key]
    after = with_value(others, key, value)
    move = estimated(after) - estimated(others)
    assert move != 0
    if key.startswith("parallel."):  # of what is written by hand
        expected = replayed(json.dumps(after)) - replayed(json.dumps(others))
        assert move == pytest.approx(expected, rel=0.05, abs=_SCALARS)


_NEVER_NEGATIVE: list[tuple[Values, Any]] = [
    *((others, with_value(others, key, value)) for key, (others, value) in {**MOVES, **NOT_REPLAYED}.items()),
    (
        {},
        {
            "parallel": {"engine": "fsdp", "accumulate": "local", "cpu_offload": True},
            "train": {"global_batch": 16},
        },
    ),
]


@pytest.mark.parametrize("values", [values for pair in _NEVER_NEGATIVE for values in pair], ids=str)
def test_no_component_is_ever_negative(values: Values) -> None:
    config = config_of(values, _PLANNEDEST)
    for point in estimate(config, ranks=ranks_of(config)).timeline:
        assert all(size >= 0 for size in point.components.values()), (point.where, point.components)


def test_an_evaluation_without_resharding_keeps_all_layers() -> None:
    """What FSDP2 has gathered stays until the end of the evaluation."""
    values = {**_FSDP, "model": {"num_layers": 6}, "eval": {"source": "embedded"}}
    each, all_of_them = (
        [p for p in estimate(config_of(with_value(values, "parallel.reshard_after_forward", reshard)), ranks=4).timeline
         if p.where.startswith("evaluation")][-1].components["buffers.gathered"]
        for reshard in (True, False)
    )  # fmt: skip
    assert all_of_them > 2 * each


@pytest.mark.parametrize("key", NOT_REPLAYED)
def test_a_field_that_replays_do_not_know_moves_the_estimate(key: str) -> None:
    others, value = NOT_REPLAYED[key]
    assert estimated(with_value(others, key, value)) != estimated(others)


def test_every_field_that_says_so_is_tried() -> None:
    assert {key for key, matters in fields(Config) if matters} == {*MOVES, *NOT_REPLAYED}


def other(value: Any) -> Any:
    """Another value of the same kind; whether it could be run does not matter here."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 3
    return "other" if value is None or isinstance(value, str) else [*value, "other"]


@pytest.mark.parametrize("others", [{}, _FSDP, _ZERO, {"optim": {"update": "per_layer", "state_bits": 8, "clip": 1.0}}])
@pytest.mark.parametrize("key", [key for key, matters in fields(Config) if not matters])
def test_no_other_field_moves_the_estimate(key: str, others: Values) -> None:
    config = config_of(others)
    ranks = ranks_of(config)
    section, _, name = key.rpartition(".")
    if section:
        old = getattr(config, section)
        changed = config.model_copy(update={section: old.model_copy(update={name: other(getattr(old, name))})})
    else:
        changed = config.model_copy(update={name: other(getattr(config, name))})
    assert estimate(changed, ranks=ranks) == estimate(config, ranks=ranks)
