"""Replays of several ranks on fake tensors take what real processes take, and ZeRO takes what the rules say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sltrain_dist.config.load import build_config
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.result import Point
from sltrain_dist.plan.replay import replayed_timeline
from tests.distributed import live
from tests.distributed.launch import launch
from tests.support.held_bytes import rank_bytes

RANKS = 2
EXACT = {"factors", "sparse_values", "dense", "index", "gradients", "states", "master_weights", "batch"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[live.Timeline]]:
    """Timelines of real ranks, by case."""
    out = tmp_path_factory.mktemp("live") / "live.json"
    launch(live, out, ranks=[RANKS])
    return json.loads(out.read_text())


def steps(timeline: Any) -> list[Point]:
    """The moments of an update. What comes before differs: real ranks send each other their first weights."""
    points = [point if isinstance(point, Point) else Point(*point) for point in timeline]
    return [point for point in points if point.phase != "init" and point.where != "begin"]


@pytest.mark.parametrize(
    ("case", "rank"), [*((case, 0) for case in live.CASES if not case.startswith("zero")), ("fsdp", 1)]
)
def test_a_replay_takes_what_real_ranks_take(case: str, rank: int, measured: dict[str, list[live.Timeline]]) -> None:
    real = steps(measured[case][rank])
    fake = steps(replayed_timeline(build_config(live.CASES[case]), RANKS, rank, device="cpu"))
    assert [(p.phase, p.where) for p in fake] == [(p.phase, p.where) for p in real]
    late = 0
    for expected, found in zip(fake, real, strict=True):
        # Gloo may hold the last message of a few numbers.
        if abs(found.total - expected.total) > 64:
            late += 1  # or, now and then, one of a block for longer than live.letting_go waits
            continue
        here, there = found.groups(), expected.groups()
        assert {g: here.get(g, 0) for g in EXACT} == pytest.approx({g: there.get(g, 0) for g in EXACT}, abs=16)
    assert late <= len(real) // 10
    peaks = [max(point.total for point in points) for points in (fake, real)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


@pytest.mark.parametrize("case", [case for case in live.CASES if case.startswith("zero")])
@pytest.mark.parametrize("rank", range(RANKS))
def test_components_of_zero_follow_the_rules(case: str, rank: int, measured: dict[str, list[live.Timeline]]) -> None:
    config = build_config(live.CASES[case])
    expected = rank_bytes(config, RANKS, rank)
    (before,) = (point.groups() for point in steps(measured[case][rank]) if point.where == "clipping")
    rotary = 4 * 2 * config.data.seq_len * config.model.head_dim
    assert before["states"] == expected.states
    assert before["gradients"] == expected.gradients
    assert sum(before.get(group, 0) for group in ("factors", "sparse_values", "dense")) == expected.parameters + rotary


@pytest.mark.parametrize("case", [case for case in live.CASES if case.startswith("zero")])
def test_estimates_of_zero_are_as_close_as_they_say(case: str, measured: dict[str, list[live.Timeline]]) -> None:
    found = estimate(build_config(live.CASES[case]), ranks=RANKS, device="cpu")
    peak = max(point.total for rank in range(RANKS) for point in steps(measured[case][rank]))
    assert max(point.total for point in steps(found.timeline)) == pytest.approx(peak, rel=found.relative_error)
    restarts = [
        point.total for rank in range(RANKS) for point in steps(measured[case][rank]) if point.phase == "restart"
    ]
    assert bool(restarts) is (build_config(live.CASES[case]).reparam.restart_every > 0)
    if restarts:
        assert found.peak_of("restart").total == pytest.approx(max(restarts), rel=found.relative_error)
