"""Whole runs with restarts: killed around one, resumed, and on several ranks."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import whole_run
from tests.distributed.launch import launch
from tests.support.runs import (
    Corpus,
    final_tensors,
    kill_after_a_checkpoint,
    metrics,
    python,
    tiny_config,
    train_here,
    trajectory,
    write_config,
)

EVERY, STEPS = 4, 11


def configuration(corpus: Corpus, **sections: dict[str, Any]) -> dict[str, Any]:
    """Restarts after the updates 4 and 8, and a checkpoint of every update."""
    reparam = {"restart_every": EVERY, "restart_warmup": 2, "rank": 6, "density": 0.1, "alpha": 12.0}
    return tiny_config(
        corpus,
        **{
            "reparam": reparam,
            "train": {"steps": STEPS},
            "eval": {"every": 2},
            "checkpoint": {"every": 1, "keep": 20},
            "optim": {"schedule": "constant", "warmup_steps": 0},
            **sections,
        },
    )


@pytest.fixture(scope="module")
def config(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("restarts") / "config.yaml", configuration(corpus))


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("restarts") / "whole"
    assert train_here(config, run_dir) == 0
    return run_dir


def test_a_run_says_what_it_does(uninterrupted: Path) -> None:
    log = (uninterrupted / "log.txt").read_text()
    assert re.search(
        r"  restarts +every 4 updates: 14 linear layers factored anew, states of all parameters cleared; the learning "
        r"rate comes back over 2 updates\n",
        log,
    )
    assert re.search(
        r"  a restart +[\d.]+ KiB for one layer at a time on each rank, [\d.e-]+ of an update's FLOPs\n", log
    )
    assert re.findall(r"restart after update (\d+): low-rank products factored anew in [\d.]+ s", log) == ["4", "8"]
    lines = [line for line in metrics(uninterrupted) if "loss" in line]
    assert [line["restarts"] for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [line["restart_s"] > 0 for line in lines] == [step in (5, 9) for step in range(1, STEPS + 1)]
    shares = [1, 1, 1, 1, 0.001, 0.5005, 1, 1, 0.001, 0.5005, 1]
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * share for share in shares])
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("step", [EVERY - 1, EVERY, EVERY + 1])
def test_resumed_from_any_update_around_a_restart(config: Path, uninterrupted: Path, tmp_path: Path, step: int) -> None:
    checkpoint = uninterrupted / "checkpoints" / f"step_{step:08}"
    assert train_here(config, tmp_path / "again", f"checkpoint.resume={checkpoint}", "checkpoint.every=0") == 0
    assert final_tensors(tmp_path / "again") == final_tensors(uninterrupted)
    resumed = [line for line in trajectory(uninterrupted) if line["step"] > step]
    assert [line for line in trajectory(tmp_path / "again") if line["step"] > step] == resumed


def test_killed_after_a_restart(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """The checkpoint of update 4 is from before its restart, which the resumed run makes again."""
    run_dir, every = tmp_path / "killed", "checkpoint.every=4"
    with python(config, run_dir, every, "train.steps=5000") as process:
        kill_after_a_checkpoint(process, run_dir, EVERY)
    resume = f"checkpoint.resume={run_dir / 'checkpoints' / 'step_00000004'}"
    assert train_here(config, run_dir, every, resume) == 0
    assert final_tensors(run_dir) == final_tensors(uninterrupted)
    assert trajectory(run_dir)[-3:] == trajectory(uninterrupted)[-3:]


def test_another_number_of_ranks_and_another_engine_go_on(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = uninterrupted / "checkpoints" / "step_00000003"
    overrides = (f"checkpoint.resume={checkpoint}", "parallel.engine=fsdp", "checkpoint.every=0")
    launch(whole_run, config, tmp_path / "two", *overrides, ranks=[2])
    for mine, theirs in zip(trajectory(tmp_path / "two")[-4:], trajectory(uninterrupted)[-4:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_a_dry_run_makes_one(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert train_here(config, tmp_path / "run", "train.dry_run=true") == 0
    assert re.search(r"^a restart: [\d.]+ s$", capsys.readouterr().out, re.MULTILINE)


def test_restarts_cannot_change(config: Path, uninterrupted: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint = f"checkpoint.resume={uninterrupted / 'checkpoints' / 'step_00000005'}"
    assert train_here(config, tmp_path / "other", checkpoint, "reparam.restart_every=3") == 5
    assert "reparam.restart_every: 4 → 3" in capsys.readouterr().err
