"""tools/bench_planner.py, public_measurements.py and bench_memory.py: a sample of the grid, what is made of rows and
peaks, and predictions of what others have measured."""

from __future__ import annotations

import argparse
import csv
import functools
import json
import sys
from pathlib import Path

import pytest

from sltrain_dist.config.load import build_config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.device_overhead import outside_bytes
from sltrain_dist.plan.follow import follow
from tests.support.held_bytes import rank_bytes
from tests.support.paths import REPO
from tests.support.ranks import SINGLE
from tests.unit.plan.test_replay import config_of

sys.path.insert(0, str(REPO / "tools"))

import bench_planner
import public_measurements
from bench_memory import Peak, live_peak
from bench_planner import LEVERS, cases, compare, run, summary
from public_measurements import Prediction

SAMPLE = [case for case in cases(11, 6, max_layers=2, on_one=False) if case["values"]["preset"] != "llama_1b"][:2]


def test_the_grid_covers_every_setting() -> None:
    drawn = list(cases(8, 200, max_layers=None, on_one=False))
    assert drawn[:5] == list(cases(8, 5, max_layers=None, on_one=False))
    assert len({json.dumps(case) for case in drawn}) == 200
    for lever, choices in LEVERS.items():
        section, _, field = lever.partition(".")
        assert {case["values"][section][field] for case in drawn} == set(choices), lever
    assert {case["ranks"] for case in drawn} == set(bench_planner.RANKS)
    assert len({case["values"]["preset"] for case in drawn}) == 5
    assert build_config(drawn[0]["values"]).model.num_layers >= 8


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case['values']['preset']} on {case['ranks']}")
def test_the_closed_form_is_close_to_replays(case: dict[str, object]) -> None:
    row = compare(case)
    assert abs(row["error"]) <= 0.05, row
    assert sum(row["components"].values()) == pytest.approx(row["error"])


@pytest.mark.slow
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


REPORT = REPO / "docs/reports/2026-11-27-public-measurements.md"
PUBLIC = public_measurements.read_measurements()
FAR_OFF = 0.1
"""Error of a prediction from which on the file must explain it."""


@functools.cache
def public_predictions() -> tuple[dict[str, Prediction], dict[str, str]]:
    """Predictions of all rows that can be expressed, by id, and why there is none of the others."""
    predictions, refused = public_measurements.predict_all(PUBLIC)
    return {prediction.row.id: prediction for prediction in predictions}, refused


def reported_errors() -> dict[str, str]:
    """The error of each row in the report's table."""
    lines = REPORT.read_text().partition("\n## Rows\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row: error for row, _, _, error, *_ in cells[2:]}


def test_public_measurements_are_complete() -> None:
    assert len(PUBLIC) >= 80
    sources = ("arXiv 2406.02214", "GaLore", "torchtune", "pytorch/ao", "torchtitan", "litgpt")
    assert all(any(source in row.source for row in PUBLIC) for source in sources)
    assert {row.planner for row in PUBLIC} == {"planner", "reference", "none"}
    assert sum(row.value == "out of memory" and row.planner != "none" for row in PUBLIC) >= 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seq_len": "long"}, "seq_len"),
        ({"seq_len": "unstated"}, "every size and setting"),
        ({"unit": "MB"}, "unit"),
        ({"unit": "none"}, "a number needs a unit"),
        ({"model": "Falcon"}, "'Falcon' is unknown"),
        ({"planner": "none", "cause": ""}, "cause must say why"),
        ({"source": " "}, "source"),
    ],
)
def test_a_wrong_measurement_is_an_error(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    row = next(row for row in PUBLIC if row.id == "torchtune-3b-packed")
    path = tmp_path / "measurements.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row.model_dump())
        writer.writeheader()
        writer.writerow(row.model_dump() | changed)
    with pytest.raises(ConfigError, match=f"row torchtune-3b-packed: .*{message}"):
        public_measurements.read_measurements(path)


def test_two_measurements_of_one_id_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "measurements.csv"
    header, row, *_ = public_measurements.MEASUREMENTS.read_text().splitlines(keepends=True)
    path.write_text(header + row + row)
    with pytest.raises(ConfigError, match="another row has the same id"):
        public_measurements.read_measurements(path)


def test_public_measurements_are_predicted_as_reported() -> None:
    """Errors are no larger than the report says; regenerate its tables as it says where they are smaller."""
    predictions, refused = public_predictions()
    assert {row.id for row in PUBLIC if row.planner == "planner"} <= set(predictions)
    assert {row.id for row in PUBLIC if row.planner == "none"} <= set(refused)
    reported = reported_errors()
    assert set(reported) == set(predictions), "regenerate the tables of the report"
    for row, prediction in predictions.items():
        if prediction.error is None:
            assert reported[row] == ""
        else:
            stated = float(reported[row].rstrip("%")) / 100
            assert abs(prediction.error) <= abs(stated) + 0.001, f"{row}: {prediction.error:+.2%}"


def test_public_predictions_that_are_far_off_are_explained() -> None:
    predictions, _ = public_predictions()
    for row, prediction in predictions.items():
        if prediction.error is not None and abs(prediction.error) > FAR_OFF:
            assert prediction.row.cause and prediction.row.difference_bytes, row
            assert abs(prediction.unexplained_error or 0) < abs(prediction.error) / 2, row
        if prediction.row.relation == "lower bound" and prediction.error is not None:
            assert prediction.error < 0.02, row


def test_no_public_measurement_is_predicted_to_fit_or_not_against_the_fact() -> None:
    predictions, _ = public_predictions()
    assert not [row for row, prediction in predictions.items() if prediction.false_fit]
    assert not [row for row, prediction in predictions.items() if prediction.false_refusal]


def test_quantities_of_public_measurements() -> None:
    """Reserved bytes are allocated ones and what idles in the allocator; a device takes context and NCCL too."""
    row = next(row for row in PUBLIC if row.id == "torchao-8b-8xh100-none")
    reserved = public_measurements.predict(row)
    allocated = public_measurements.predict(row.model_copy(update={"quantity": "allocated"}))
    assert reserved.device_bytes == allocated.device_bytes
    assert 0.05 < reserved.predicted_bytes / allocated.predicted_bytes - 1 < 0.1
    assert reserved.device_bytes - reserved.predicted_bytes == outside_bytes(8)
    one = public_measurements.predict(row.model_copy(update={"quantity": "outcome", "unit": "none", "value": "ran"}))
    assert one.predicted_bytes == one.device_bytes and one.error is None


def test_public_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_planner.py", "--public", "--json"])
    bench_planner.main()
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["predicted"]) + len(printed["not_predicted"]) == len(PUBLIC)
    broken = tmp_path / "measurements.csv"
    broken.write_text(public_measurements.MEASUREMENTS.read_text().replace("GiB", "GB?"))
    monkeypatch.setattr(bench_planner, "read_measurements", lambda: public_measurements.read_measurements(broken))
    with pytest.raises(SystemExit) as stopped:
        bench_planner.main()
    assert stopped.value.code == 2
    assert "unit" in capsys.readouterr().err
