"""A run that was stopped and killed gives, bit by bit, what one that was left alone gives."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import (
    Corpus,
    final_tensors,
    kill_after_a_checkpoint,
    last_step,
    metrics,
    outcome,
    python,
    saved_steps,
    tiny_config,
    train_here,
    trajectory,
    write_config,
)

STEPS = 80
EVERY = 20


def configuration(corpus: Corpus, batching: str, optim: dict[str, Any]) -> dict[str, Any]:
    """Three epochs and more, with rows that a worker prepares ahead, and two micro-batches per update."""
    return tiny_config(
        corpus,
        data={"batching": batching, "reset_attention": batching == "pack", "workers": 1},
        optim=optim,
        train={"steps": STEPS},
        eval={"every": 10},
        checkpoint={"every": EVERY},
    )


def stop_early(config: Path, run_dir: Path) -> None:
    """Starts a run and ends it with SIGTERM after three updates or a few more."""
    with python(config, run_dir) as process:
        process.until(lambda: last_step(run_dir) >= 3, "step 3")
        process.send(signal.SIGTERM)
        assert process.wait() == 75, process.stderr
    stopped_at = last_step(run_dir)
    assert stopped_at < EVERY
    assert saved_steps(run_dir) == [stopped_at]
    ended = outcome(run_dir)
    assert (ended["code"], ended["step"]) == (75, stopped_at)
    assert "SIGTERM" in ended["reason"]


@pytest.mark.parametrize(
    ("batching", "optim", "first_stopped"),
    [("pad", {"factors": "spectron"}, True), ("pack", {"update": "per_layer"}, False)],
    ids=["spectron", "per-layer"],
)
def test_stopped_killed_and_resumed_equals_uninterrupted(
    corpus: Corpus, tmp_path: Path, batching: str, optim: dict[str, Any], first_stopped: bool
) -> None:
    config = write_config(tmp_path / "config.yaml", configuration(corpus, batching, optim))
    run_dir, uninterrupted = tmp_path / "broken", tmp_path / "whole"
    if first_stopped:
        stop_early(config, run_dir)
    with python(config, run_dir) as process:
        kill_after_a_checkpoint(process, run_dir, EVERY)
    assert last_step(run_dir) < STEPS
    ended = outcome(run_dir)
    assert ended["code"] is None
    assert "killed" in ended["reason"]

    assert train_here(config, run_dir) == 0
    assert outcome(run_dir)["code"] == 0
    assert train_here(config, uninterrupted) == 0
    lines = metrics(run_dir)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == list(range(0, STEPS + 1, 10))
    assert trajectory(run_dir) == trajectory(uninterrupted)
    assert final_tensors(run_dir) == final_tensors(uninterrupted)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 1, "nothing was learned, so that nothing was compared"
