"""The planner's search, with an estimator of three lines, so that what must come out is plain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain_dist.config.load import load_config
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.estimate import estimate as closed_form
from sltrain_dist.memory.result import Estimate, Point
from sltrain_dist.plan import answer as answers
from sltrain_dist.plan.answer import Answer
from sltrain_dist.plan.reports.drawing import draw, ticks
from sltrain_dist.plan.reports.labels import GROUPS
from sltrain_dist.plan.search.combinations import Row, evaluate, pareto, search, single_changes
from sltrain_dist.plan.search.levers import default_levers, named_levers
from sltrain_dist.plan.search.speed import update_time
from sltrain_dist.plan.units import GPUS, parse_device_memory


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
    monkeypatch.setattr("sltrain_dist.plan.search.combinations._WORTH_A_PROCESS", 1)
    levers = named_levers(config, 2, ["state bits", "recompute", "update"])
    alone, shared = (search(config, 2, levers, closed_form, workers=workers).rows for workers in (1, 2))
    assert shared == alone and len(alone) == 24


def test_other_methods(config: Config) -> None:
    found = search(
        config, 1, named_levers(config, 1, ["reparam.method=sltrain,lowrank,full,galore,relora"]), closed_form
    )
    assert found.refused == {"reparam.method": 2}
    assert {row.settings["reparam.method"]: row.parameters // 1000 for row in found.front()} == {
        "sltrain": 43_529,
        "lowrank": 42_770,
        "full": 58_073,
    }
    with pytest.raises(ConfigError, match=r"reparam\.method = 'galore' is known to `sltrain plan` only"):
        closed_form(changed(config, reparam={"method": "galore"}))


def test_values_per_row_are_those_of_the_estimate(config: Config) -> None:
    (row,) = search(config, 4, named_levers(config, 4, ["train.micro_batch=8"]), estimate).rows
    expected = estimate(row.config, ranks=4)
    assert (row.peak_bytes, row.device_bytes) == (expected.peak_bytes, expected.device_bytes) == (16_800, 16_810)
    assert (row.parameters, row.flops_per_token, row.comm_bytes_per_update) == (7, 8, 4)
    assert (row.phase, row.where, row.binding) == ("backward", "block 0", "states")
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
    usual = evaluate(config, 1, {}, estimate)
    rows = [Row(**{**usual.__dict__, "device_bytes": size, "seconds": seconds}) for size, seconds in figures]
    front = pareto(rows)
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
        (["train.global_batch=64,128"], "a search leaves train.global_batch as it is"),
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
    paths = answers.save(found.rows, tmp_path / "new" / "rows")
    loaded = [load_config(path) for path in paths]
    assert [each.model_copy(update={"run_dir": config.run_dir}) for each in loaded] == [
        row.config for row in found.rows
    ]
    assert len({each.run_dir for each in loaded}) == len(paths) == 4
    with pytest.raises(ConfigError, match="is there already"):
        answers.save(found.rows, tmp_path / "new" / "rows")
    with pytest.raises(ConfigError, match="cannot write"):
        answers.save(found.rows, Path(paths[0]) / "below")


def changed(config: Config, **sections: dict[str, object]) -> Config:
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


SLOWER: list[Callable[[Config], Config]] = [
    lambda config: changed(config, train={"activation_checkpointing": "full"}),
    lambda config: changed(config, train={"micro_batch": 1}),
    lambda config: changed(config, train={"dtype": "fp32"}),
    lambda config: changed(config, optim={"state_bits": 8}),
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


def test_time_of_communication(config: Config) -> None:
    quiet, busy = (update_time(config, 4, sent) for sent in (0, 10**12))
    assert quiet.communication == 0 and busy.communication > 0
    assert (quiet.compute, quiet.optimizer) == (busy.compute, busy.optimizer)
    sharded = changed(config, parallel={"engine": "fsdp"})
    assert update_time(sharded, 4, 0).optimizer < quiet.optimizer
    # Reduce-scatters overlap with all passes, one all-reduce with the last backward pass.
    assert update_time(sharded, 4, 10**12).communication < busy.communication


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["forward", "backward"]), st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1
    )
)
def test_drawing(moments: list[tuple[str, int, int]]) -> None:
    points = tuple(Point(phase, "", {"states": a, "batch": b}) for phase, a, b in moments)  # type: ignore[arg-type]
    drawing = draw(Estimate(points, 0, 1, 1, 0, 0.05))
    assert list(drawing.xs) == sorted(drawing.xs) and 0 <= min(drawing.xs) <= max(drawing.xs) <= 1 + 1e-9
    assert list(drawing.heights) == [group for group in GROUPS if group in drawing.heights]
    if drawing.heights:
        *_, (_, top) = drawing.stacked().values()
        assert max(top) == max(a + b for _, a, b in moments)
        at_peak = [y for x, y in zip(drawing.xs, top, strict=True) if x == drawing.peak_x]
        assert max(top) in at_peak


@given(st.integers(1, 10**15))
def test_ticks(top: int) -> None:
    values = ticks(top)
    assert values[0] == 0 and values[-1] <= top and (top < 3 or 2 <= len(values) <= 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 << 30),
        ("24 gib", 24 << 30),
        ("80GB", 80 * 10**9),
        ("1.5TB", 1_500_000_000_000),
        ("25769803776", 24 << 30),  # can only be bytes
        ("24564 MiB", 24_564 << 20),
        ("24G", 24 * 10**9),
        ("24gi", 24 << 30),
        ("500M", 500 * 10**6),
        ("10B", 10),
    ],
)
def test_device_memory(text: str, expected: int) -> None:
    assert parse_device_memory(text) == expected


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("NVIDIA H100 80GB HBM3", 81559),
        ("NVIDIA H100 PCIe", 81559),
        ("H100 SXM5 80GB", 81559),
        ("NVIDIA H100 NVL", 95830),
        ("NVIDIA H200", 143771),
        ("h200 141GB", 143771),
        ("NVIDIA B200", 183359),
        ("NVIDIA A100-SXM4-40GB", 40960),
        ("NVIDIA A100-PCIE-40GB", 40960),
        ("NVIDIA A100-SXM4-80GB", 81920),
        ("NVIDIA A100 80GB PCIe", 81920),
        ("A100-80G", 81920),
        ("Tesla T4", 15360),
        ("T4 16GB", 15360),
        ("Tesla V100-SXM2-16GB", 16384),
        ("Tesla V100-SXM2-32GB", 32768),
        ("NVIDIA L4", 23034),
        ("L4 24GB", 23034),
        ("NVIDIA L40S", 46068),
        ("NVIDIA A10", 23028),
        ("NVIDIA A10G", 23028),
        ("NVIDIA GeForce RTX 3090", 24576),
        ("RTX 3090 24GB", 24576),
        ("3090 Ti", 24564),  # and not so many tebibytes
        ("5070ti", 16303),
        ("NVIDIA GeForce RTX 4090", 24564),
        ("rtx4090", 24564),
        ("rtx_4090", 24564),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376),
        ("RTX 5090", 32607),
        ("NVIDIA RTX A6000", 49140),
        ("A6000", 49140),
        ("NVIDIA RTX 6000 Ada Generation", 49140),
        ("RTX6000Ada", 49140),
        ("NVIDIA GH200 480GB", 97871),
    ],
)
def test_gpus_by_the_names_of_nvidia_smi(text: str, mib: int) -> None:
    assert parse_device_memory(text) == mib << 20


@pytest.mark.parametrize("name", list(GPUS))
def test_spelling_of_a_gpu_does_not_matter(name: str) -> None:
    for spelling in (name.lower(), name.replace(" ", "-"), name.replace(" ", ""), f"NVIDIA {name}"):
        assert parse_device_memory(spelling) == GPUS[name] << 20


@pytest.mark.parametrize(
    "text",
    [
        "A100",
        "RTX 4091",
        "24 gigs",
        "-24GiB",
        "0GiB",
        "",
        "GiB",
        "nan",
        "9" * 400,
        "L4 48GB",
        "24,5GB",
        "1e999",
        "4060 Ti",
    ],
)
def test_wrong_device_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="GiB, 80GB or bytes"):
        parse_device_memory(text)


@pytest.mark.parametrize("text", ["24", "80", "24564", "0.5", "99999999"])
def test_a_number_without_a_unit(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--device-memory {text}: of which unit. Write {text}GiB, {text}GB or so"):
        parse_device_memory(text)


def test_gpus_that_were_perhaps_meant() -> None:
    with pytest.raises(ConfigError, match=r"no known GPU; did you mean 'A100-40G' or 'A100-80G'\? Sizes are"):
        parse_device_memory("nvidia a100")
    with pytest.raises(ConfigError, match=r"'abacus' is no size and no known GPU\. Sizes are"):
        parse_device_memory("abacus")
    with pytest.raises(ConfigError, match=r"of which unit\? .*; did you mean 'RTX 4090' or 'RTX 4090 Laptop'\?"):
        parse_device_memory("4090")


def test_no_row_without_an_answer(config: Config) -> None:
    known = Answer(config, 1, 20_000, estimate(config))
    assert known.fits and known.margin_bytes == 20_000 - 16_410
    assert Answer(config, 1, None, estimate(config)).fits is None
