"""The planner's search, with an estimator of three lines, so that what must come out is plain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain_dist.config.load import load_config
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.estimate import estimate as closed_form
from sltrain_dist.memory.result import Estimate, Point
from sltrain_dist.plan.planned_run import PlannedRun, save_rows
from sltrain_dist.plan.search.combinations import evaluate, pareto_front, search, single_changes
from sltrain_dist.plan.search.levers import default_levers, named_levers
from sltrain_dist.plan.search.speed import update_time


def estimate(config: Config, *, ranks: int = 1) -> Estimate:
    """1000 bytes a bit of state, over the ranks that shard, 100 a sequence, which recomputation saves."""
    states = 1000 * config.optim.state_bits // (1 if config.parallel.engine == "ddp" else ranks)
    activations = 100 * config.train.micro_batch if config.train.activation_checkpointing == "none" else 0
    point = Point("backward", "block 0", {"states": states, "activations.mlp": activations})
    return Estimate((Point("init", "start", {"states": states}), point), 10, 7, 8, ranks, 0.05)


@pytest.fixture
def config() -> Config:
    return load_config(None, ["preset=llama_60m", "train.micro_batch=4", "train.global_batch=64"])


def test_every_combination_is_run_refused_or_equal(config: Config) -> None:
    varied = ["parallel.engine=ddp,zero", "parallel.zero_stage=1,2,3", "optim.state_bits=16,8"]
    levers = named_levers(config, 2, varied)
    found = search(config, 2, levers, estimate)
    assert found.examined == 12
    assert found.equal == 4  # the stages, under ddp
    assert found.refused == {"optim.state_bits": 3}  # 8 bits under zero
    assert {tuple(row.settings.values()) for row in found.rows} == {
        ("ddp", "1", "16"),
        ("ddp", "1", "8"),
        *(("zero", str(stage), "16") for stage in (1, 2, 3)),
    }
    assert all(row.config.train.global_batch == 64 for row in found.rows)
    assert found.smallest.settings["parallel.engine"] in ("ddp", "zero") and found.smallest.peak_bytes == 8400


def test_several_processes_find_the_same(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sltrain_dist.plan.search.combinations._MIN_CANDIDATES_FOR_PROCESSES", 1)
    levers = named_levers(config, 2, ["state bits", "recompute", "update"])
    alone, shared = (search(config, 2, levers, closed_form, workers=workers).rows for workers in (1, 2))
    assert shared == alone and len(alone) == 30


def test_other_methods(config: Config) -> None:
    found = search(
        config, 1, named_levers(config, 1, ["reparam.method=sltrain,lowrank,full,galore,relora"]), closed_form
    )
    assert found.refused == {"reparam.method": 1}
    assert {row.settings["reparam.method"]: row.parameters // 1000 for row in found.front()} == {
        "sltrain": 43_529,
        "lowrank": 42_770,
        "full": 58_073,
        "galore": 58_073,
    }
    with pytest.raises(ConfigError, match=r"reparam\.method = 'relora' never merges"):
        closed_form(changed(config, reparam={"method": "relora"}))


def test_values_per_row_are_those_of_the_estimate(config: Config) -> None:
    (row,) = search(config, 4, named_levers(config, 4, ["train.micro_batch=8"]), estimate).rows
    expected = estimate(row.config, ranks=4)
    assert (row.peak_bytes, row.device_bytes) == (expected.peak_bytes, expected.device_bytes) == (16_800, 16_810)
    assert (row.parameters, row.flops_per_token, row.comm_bytes_per_update) == (7, 8, 4)
    assert (row.peak.phase, row.peak.where, row.binding) == ("backward", "block 0", "states")
    start = update_time(config, 4, 4).total
    assert row.relative_speed == pytest.approx(start / update_time(row.config, 4, 4).total)


def test_single_changes_are_the_cheapest_first(config: Config) -> None:
    """It takes 16,410 bytes; only fewer bits bring that below 9,000, the fewest with the smallest result first."""
    levers = default_levers(config, 1)
    changes = single_changes(config, 1, levers, estimate, device_memory=9000)
    assert [dict(change.values) for change in changes] == [{"optim.state_bits": 4}, {"optim.state_bits": 8}]
    assert all(change.row.device_bytes <= 9000 for change in changes)
    assert [change.row.seconds for change in changes] == sorted(change.row.seconds for change in changes)
    # 16,010 bytes: recomputation does it too, and is slower than fewer sequences at a time or fewer bits.
    more = single_changes(config, 1, levers, estimate, device_memory=16_010)
    assert {"train.activation_checkpointing": "full"} in [dict(change.values) for change in more]
    assert next(iter(more[-1].values)) == "train.activation_checkpointing"
    assert not single_changes(config, 1, levers, estimate, device_memory=100)


def test_other_models_are_not_compared(config: Config) -> None:
    found = search(config, 1, named_levers(config, 1, ["reparam.rank=64,128"]), estimate)
    assert sorted(row.config.reparam.rank for row in found.front()) == [64, 128]
    assert not found.front(device_memory=100)


figures = st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.001, 1000)), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(figures)
def test_pareto(figures: list[tuple[int, float]]) -> None:
    config = load_config(None, ["train.steps=1"])
    usual = evaluate(config, {}, 1, estimate)
    rows = [replace(usual, reserved_bytes=size - usual.peak_bytes, seconds=seconds) for size, seconds in figures]
    front = pareto_front(rows)
    assert front
    for first, second in itertools.pairwise(front):  # slower, and worth it
        assert first.seconds < second.seconds and second.device_bytes < 0.99 * first.device_bytes
    for row in rows:  # for every row one on the front is about as fast and about as small
        assert any(
            kept.seconds <= 1.0101 * row.seconds and kept.device_bytes <= 1.0102 * row.device_bytes for kept in front
        )


@pytest.mark.parametrize(
    ("varied", "expected"),
    [
        (["optim.state_bits=8,5"], "--vary: optim.state_bits = 5: should be 32, 16, 8 or 4"),
        (["optim.state_bit=8"], "did you mean optim.state_bits?"),
        (["nothing"], "--vary 'nothing' is neither section.key=value,value,… nor one of 'state bits'"),
        (["train.global_batch=64,128"], "a search never varies train.global_batch"),
        (["nowhere.rank=64"], "nowhere"),
        (["optim.state_bits="], "has no values"),
        (["state bits", "optim.state_bits=8"], "optim.state_bits is varied twice"),
        (["optim.state_bits=8", "optim.state_bits=4"], "optim.state_bits is varied twice"),
    ],
)
def test_wrong_levers(config: Config, varied: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        named_levers(config, 1, varied)
    assert expected in str(error.value)


def test_named_levers(config: Config) -> None:
    levers = named_levers(config, 8, ["engine", "reparam.row_block_bytes=null,1048576"])
    assert [lever.name for lever in levers] == ["engine", "reparam.row_block_bytes"]
    assert len(levers[0].settings) == 9
    assert [setting.label for setting in levers[1].settings] == ["null", "1048576"]


def test_saved_rows_are_ready_to_run(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(config, 2, named_levers(config, 2, ["optim.state_bits=16,8", "train.micro_batch=1,32"]), estimate)
    paths = save_rows(found.rows, tmp_path / "new" / "rows")
    loaded = [load_config(path) for path in paths]
    assert [each.model_copy(update={"run_dir": config.run_dir}) for each in loaded] == [
        row.config for row in found.rows
    ]
    assert len({each.run_dir for each in loaded}) == len(paths) == 4
    with pytest.raises(ConfigError, match="already exists"):
        save_rows(found.rows, tmp_path / "new" / "rows")
    for directory in (Path(paths[0]), Path(paths[0]) / "below"):  # a file where a directory must be
        with pytest.raises(ConfigError, match=f"--save: cannot write {directory}: "):
            save_rows(found.rows, directory)


def changed(config: Config, **sections: dict[str, object]) -> Config:
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


SLOWER: list[Callable[[Config], Config]] = [
    lambda config: changed(config, train={"activation_checkpointing": "full"}),
    lambda config: changed(config, train={"micro_batch": 1}),
    lambda config: changed(config, train={"dtype": "fp32"}),
    lambda config: changed(config, optim={"state_bits": 8}),
    lambda config: changed(config, optim={"factors": "muon"}),
    lambda config: changed(
        config, optim={"update": "per_layer", "clip": 1.0, "clip_mode": "two_pass"}, train={"micro_batch": 64}
    ),
    lambda config: changed(config, reparam={"rank": 256}),
]


@pytest.mark.parametrize("change", SLOWER)
def test_what_is_slower(config: Config, change: Callable[[Config], Config]) -> None:
    slower = change(config)
    base = changed(config, train={"micro_batch": 64}) if slower.train.micro_batch == 64 else config
    assert update_time(slower, 1, 0).total > update_time(base, 1, 0).total


def test_time_of_recomputation(config: Config) -> None:
    """Of large micro-batches, which launches do not hold up: about a third more, and less with attention or all
    products kept."""
    full, attention, products = (
        {"activation_checkpointing": kind, "checkpoint_policy": policy}
        for kind, policy in (("full", "attention"), ("selective", "attention"), ("selective", "ops"))
    )
    large = changed(config, train={"micro_batch": 64}, data={"seq_len": 2048})
    usual = update_time(large, 1, 0).compute
    times = [
        update_time(changed(large, train={**each, "micro_batch": 64}), 1, 0).compute
        for each in (full, attention, products)
    ]
    assert 1.15 * usual < times[1] < times[0] < 1.35 * usual
    assert usual < times[2] < 1.15 * usual  # norms, rotations and the like


def test_time_of_dense_layers(config: Config) -> None:
    """Two layers of eight go a quarter of the way from the time of replaced layers to that of dense ones."""
    large = changed(config, train={"micro_batch": 64}, data={"seq_len": 2048})
    none, two, all_of_them = (
        update_time(changed(large, reparam=reparam), 1, 0).compute
        for reparam in ({}, {"dense_layers": (0, -1)}, {"method": "full"})
    )
    assert config.model.num_layers == 8
    assert none != all_of_them
    assert two == pytest.approx(none + (all_of_them - none) / 4)


def test_dense_layers_can_be_varied(config: Config) -> None:
    found = search(config, 1, named_levers(config, 1, ["reparam.dense_layers=[],[0],[0,-1],[9]"]), closed_form)
    assert {row.settings["reparam.dense_layers"] for row in found.rows} == {"[]", "[0]", "[0, -1]"}
    assert len({row.parameters for row in found.rows}) == 3
    assert found.refused == {"reparam.dense_layers": 1}


def test_time_of_communication(config: Config) -> None:
    quiet, busy = (update_time(config, 4, sent) for sent in (0, 10**12))
    assert quiet.communication == 0 and busy.communication > 0
    assert (quiet.compute, quiet.optimizer) == (busy.compute, busy.optimizer)
    sharded = changed(config, parallel={"engine": "fsdp"})
    assert update_time(sharded, 4, 0).optimizer < quiet.optimizer
    # Reduce-scatters overlap with all passes, one all-reduce with the last backward pass.
    assert update_time(sharded, 4, 10**12).communication < busy.communication


def test_whether_a_run_fits(config: Config) -> None:
    planned = PlannedRun(config, 1, 20_000, estimate(config))
    assert planned.fits and planned.margin_bytes == 20_000 - 16_410
    assert PlannedRun(config, 1, None, estimate(config)).fits is None
