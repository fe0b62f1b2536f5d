"""The facade: who is told what, and that nothing of it stops training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import sltrain_dist.tracking.tracker as module
from sltrain_dist.config.schema import TrackingConfig
from sltrain_dist.errors import StorageError
from sltrain_dist.tracking.console import Screen
from sltrain_dist.tracking.tracker import RunTracker

TRAIN = {
    "step": 10,
    "loss": 5.0,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens": 2560,
    "tokens_per_s": 100.0,
    "data_wait_s": 0.1,
    "peak_memory_bytes": 1 << 30,
    "elapsed_s": 25.6,
    "mfu": None,
}
EVALUATION = {"step": 10, "eval_loss": 5.0, "eval_perplexity": 148.4, "eval_tokens": 1000}


class FakeMlflow:
    made: list[FakeMlflow]
    where: str | None

    def __init__(self, tracking: TrackingConfig, run_dir: Path, params: Any, *, resumed_step: int, warn: Any) -> None:
        self.params, self.resumed_step = params, resumed_step
        self.calls: list[Any] = []
        FakeMlflow.made.append(self)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.calls.append((step, metrics))

    def close(self, status: str) -> str | None:
        self.calls.append(status)
        return FakeMlflow.where


@pytest.fixture(autouse=True)
def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMlflow.made, FakeMlflow.where = [], None
    monkeypatch.setattr(module, "MlflowTracker", FakeMlflow)


def make(run_dir: Path, **more: Any) -> tuple[RunTracker, io.StringIO]:
    text = io.StringIO()
    options: dict[str, Any] = {
        "config_flat": {"seed": 0},
        "total_steps": 100,
        "total_tokens": None,
        "is_main": True,
        "screen": Screen(file=text, force_terminal=False),
    }
    return RunTracker(more.pop("tracking", TrackingConfig()), run_dir, **(options | more)), text


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    tracker, text = make(run_dir, resumed_step=3)
    tracker.summary({"Model": [("parameters", "5.03M")]})
    tracker.note("resumed")
    tracker.warn("careful")
    tracker.progress(10, 2560, 5.0)
    tracker.train(TRAIN)
    tracker.evaluation(EVALUATION)
    tracker.close("FINISHED")
    tracker.close("FAILED")
    assert records(run_dir) == [TRAIN, EVALUATION]
    for part in ("parameters  5.03M", "resumed", "warning: careful", "step 10/100  loss 5.000", "eval loss 5.000"):
        assert part in text.getvalue()
    assert (run_dir / "log.txt").read_text() == text.getvalue()
    (mlflow,) = FakeMlflow.made
    assert (mlflow.params, mlflow.resumed_step) == ({"seed": 0}, 3)
    known = {key: value for key, value in TRAIN.items() if key not in {"step", "mfu"}}
    assert mlflow.calls[:2] == [(10, known), (10, {key: value for key, value in EVALUATION.items() if key != "step"})]
    assert mlflow.calls[2] == "FINISHED"


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    tracker, text = make(tmp_path / "absent", is_main=False)
    tracker.summary({"a": [("b", "c")]})
    tracker.note("a")
    tracker.warn("b")
    tracker.progress(1, 1, 1.0)
    tracker.train(TRAIN)
    tracker.evaluation(EVALUATION)
    tracker.close("FINISHED")
    assert text.getvalue() == ""
    assert list(tmp_path.iterdir()) == []
    assert FakeMlflow.made == []


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [("mlflow ui X", "FINISHED", True), ("mlflow ui X", "KILLED", False), (None, "FINISHED", False)],
)
def test_where_to_look_is_said_last_and_only_if_the_run_is_there(
    tmp_path: Path, where: str | None, status: Any, said: bool
) -> None:
    tracker, text = make(tmp_path)
    FakeMlflow.where = where
    tracker.note("done")
    tracker.close(status)
    assert text.getvalue().endswith("look at the run:     mlflow ui X\n" if said else "done\n")


def test_mlflow_off(tmp_path: Path) -> None:
    tracker, _ = make(tmp_path, tracking=TrackingConfig(mlflow=False))
    tracker.train(TRAIN)
    tracker.close("FINISHED")
    assert FakeMlflow.made == []
    assert len(records(tmp_path)) == 1


def test_whether_a_resumed_run_has_been_evaluated(tmp_path: Path) -> None:
    for resumed_step in (0, 10):
        tracker, _ = make(tmp_path, resumed_step=resumed_step)
        assert tracker.has_evaluation(10) is (resumed_step == 10)
        tracker.evaluation(EVALUATION)
        tracker.train(TRAIN | {"step": 20})
        assert tracker.has_evaluation(10)
        assert not tracker.has_evaluation(20)
        tracker.close("KILLED")


def test_resume_continues_the_metrics(tmp_path: Path) -> None:
    for resumed_step, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        tracker, _ = make(tmp_path, resumed_step=resumed_step)
        for step in steps:
            tracker.train(TRAIN | {"step": step})
        tracker.close("KILLED")
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30, 40]


@pytest.mark.parametrize(("steps", "tokens", "eta"), [(100, 10**9, "1:30"), (None, 4000, "0:30"), (None, None, None)])
def test_time_that_is_left(tmp_path: Path, steps: int | None, tokens: int | None, eta: str | None) -> None:
    now = [0.0]
    tracker, text = make(tmp_path, total_steps=steps, total_tokens=tokens, clock=lambda: now[0])
    for step in range(1, 11):  # a second and 100 tokens each
        now[0] += 1.0
        tracker.progress(step, 100 * step, 5.0)
    tracker.train(TRAIN | {"tokens": 1000})
    tracker.close("FINISHED")
    assert (f"ETA {eta}" in text.getvalue()) if eta else ("ETA" not in text.getvalue())


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    text = io.StringIO()
    screen = Screen(file=text, force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"})
    tracker, _ = make(tmp_path, screen=screen)
    tracker.train(TRAIN)
    tracker.progress(11, 2600, 4.5)
    tracker.close("FINISHED")
    assert "step 11/100  loss 4.500  100 tok/s  lr 1.0e-03" in text.getvalue()


def test_run_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"run_dir = .*file/x cannot be written"):
        make(tmp_path / "file" / "x")


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.JsonLines, "write", full)
    tracker, text = make(tmp_path)
    for step in range(1, 4):
        tracker.train(TRAIN | {"step": step})
    tracker.close("FINISHED")
    assert text.getvalue().count("lines are missing from metrics.jsonl: ") == 1
    assert text.getvalue().count("loss 5.000") == 3
    assert len(FakeMlflow.made[0].calls) == 4


def samples(run_dir: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [(line["step"], [each["continuation"] for each in line["samples"]]) for line in lines]


def test_samples_are_recorded_once_and_follow_the_run(tmp_path: Path) -> None:
    tracking = TrackingConfig(mlflow=False)
    tracker, text = make(tmp_path, with_samples=True, tracking=tracking)
    for step in (0, 10, 20):
        tracker.samples(step, [("a prompt", " goes\non"), ("née", "")])
    tracker.samples(20, [("a prompt", " of an evaluation that is repeated")])
    assert "step 10  'a prompt' goes on with ' goes\\non'\n" in text.getvalue()
    first = [(step, [" goes\non", ""]) for step in (0, 10, 20)]
    assert samples(tmp_path) == first
    tracker.go_back(10)
    assert samples(tmp_path) == first[:2]
    tracker.samples(20, [("a prompt", " again")])
    tracker.close("KILLED")
    tracker, _ = make(tmp_path, with_samples=True, tracking=tracking, resumed_step=10)
    tracker.samples(20, [("a prompt", " after a resume")])
    tracker.close("FINISHED")
    assert samples(tmp_path) == [*first[:2], (20, [" after a resume"])]


def test_samples_that_cannot_be_written_stop_nothing(tmp_path: Path) -> None:
    tracker, text = make(tmp_path, with_samples=True, tracking=TrackingConfig(mlflow=False))
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "samples.jsonl").mkdir()
    for step in (10, 20):
        tracker.samples(step, [("a prompt", "")])
        tracker.train({**TRAIN, "step": step})
    tracker.close("FINISHED")
    assert text.getvalue().count("lines are missing from samples.jsonl: ") == 1
    assert [line["step"] for line in records(tmp_path)] == [10, 20]
