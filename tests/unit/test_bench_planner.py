"""tools/bench_planner.py and tools/bench_memory.py: a sample of the grid, and what is made of rows and peaks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from sltrain_dist.config.load import build_config
from sltrain_dist.parallel.partition import rank_bytes
from sltrain_dist.plan.follow import follow
from tests.unit.ranks import SINGLE
from tests.unit.test_replay import config_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import bench_planner
from bench_memory import Peak, live_peak
from bench_planner import LEVERS, cases, compare, run, summary

SAMPLE = [case for case in cases(11, 6, max_layers=2, on_one=False) if case["values"]["preset"] != "llama_1b"][:3]


def test_the_grid_covers_every_setting() -> None:
    drawn = list(cases(7, 200, max_layers=None, on_one=False))
    assert drawn[:5] == list(cases(7, 5, max_layers=None, on_one=False))
    assert len({json.dumps(case) for case in drawn}) == 200
    for lever, choices in LEVERS.items():
        section, _, field = lever.partition(".")
        assert {case["values"][section][field] for case in drawn} == set(choices), lever
    assert {case["ranks"] for case in drawn} == set(bench_planner.RANKS)
    assert len({case["values"]["preset"] for case in drawn}) == 5
    assert build_config(drawn[0]["values"]).model.num_layers >= 8


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case['values']['preset']} on {case['ranks']}")
def test_the_closed_form_is_close_to_replays(case: dict[str, object]) -> None:
    row = compare(case)
    assert abs(row["error"]) <= 0.05, row
    assert sum(row["components"].values()) == pytest.approx(row["error"])


def test_peaks_by_category_of_real_and_of_fake_tensors() -> None:
    """What tools/bench_memory.py reports."""
    config = config_of(optim={"state_bits": 32, "master_weights": True})
    real, fake = (live_peak(config, fake=fake) for fake in (False, True))
    held = rank_bytes(config, 1, 0)
    rotary = 4 * 2 * config.data.seq_len * config.model.head_dim
    for peak in (real, fake):
        assert (peak.parameters, peak.states) == (held.parameters + rotary, held.states)
        assert peak.total == peak.parameters + peak.states + peak.gradients + peak.other
    assert real.other > fake.other > 0  # a GPU's RMSNorm keeps less in bf16
    assert real == Peak.of(
        max((p for p in follow(config, SINGLE) if p.phase not in ("init", "save")), key=lambda p: p.total)
    )


def test_summary_of_rows() -> None:
    rows = [
        {"error": error, "phases": {"forward": 2 * error}, "components": {"states": error, "index": 0.0}}
        for error in (0.01, -0.04, 0.02)
    ]
    found = summary(rows)
    assert found["compared"] == 3
    assert found["peak"] == {"median": 0.02, "p95": 0.02, "worst": -0.04}
    assert found["phases"]["forward"]["worst"] == -0.08 and found["components"]["index"]["worst"] == 0
    measured = [{"false_fit": True}, {"error": 0.02, "replay_error": -0.01, "false_fit": False}]
    assert summary(measured)["false_fits"] == 1 and summary(measured)["replay"]["worst"] == -0.01


def test_rows_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**case, "error": 0.0}) + "\n" for case in SAMPLE))
    args = argparse.Namespace(rows=rows, jobs=1, cuda=False)
    assert [row["error"] for row in run(SAMPLE, args)] == [0.0] * len(SAMPLE)
    assert len(rows.read_text().splitlines()) == len(SAMPLE)
