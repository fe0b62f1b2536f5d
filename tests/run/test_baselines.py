"""Whole runs of the published baselines: resumed in their middle, to the bit; and from other weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.checkpoint.contents import damage
from tests.support.runs import Corpus, final_tensors, metrics, tiny_config, train_here, trajectory, write_config

STEPS, FIRST = 6, 3

RUNS = {
    "cola": ("reparam.method=cola",),
    "galore, per layer, 8 bits": ("reparam.method=galore", "optim.update=per_layer", "optim.state_bits=8"),
    "relora": ("reparam.method=relora", "reparam.restart_every=2", "reparam.restart_states=factors"),
    "apollo": ("reparam.method=apollo",),
    "apollo-mini": ("reparam.method=apollo-mini",),
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_resumed_equals_uninterrupted(corpus: Corpus, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """From between two projections or merges, which are at the beginning of the updates 3 and 5, on to one."""
    config = write_config(
        tmp_path / "config.yaml",
        tiny_config(
            corpus,
            reparam={"rank": 6},
            optim={"projection_every": 2},
            train={"steps": STEPS},
            eval={"every": STEPS},
            checkpoint={"every": FIRST, "keep": 9},
        ),
    )
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train_here(config, whole, *settings) == 0
    losses = [line["loss"] for line in metrics(whole) if "loss" in line]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert damage(whole / "checkpoints" / f"step_{STEPS:08}") is None
    resume = f"checkpoint.resume={whole / 'checkpoints' / f'step_{FIRST:08}'}"
    assert train_here(config, again, *settings, resume) == 0
    assert final_tensors(again) == final_tensors(whole)
    assert trajectory(again)[-1] == trajectory(whole)[-1]


def test_a_warm_start_of_relora(tiny: Path, tmp_path: Path) -> None:
    """From dense weights, as published, with the loss that these had; and back."""
    dense, run_dir, back = (tmp_path / name for name in ("dense", "relora", "back"))
    relora = ("reparam.method=relora", "reparam.restart_every=2")
    assert train_here(tiny, dense, "reparam.method=full") == 0
    assert train_here(tiny, run_dir, f"checkpoint.init_from={dense}", *relora, "seed=9") == 0
    assert evaluation(run_dir, 0) == evaluation(dense, 6)
    assert evaluation(run_dir, 6) < evaluation(run_dir, 0)
    assert "converted 14 linear layers from full to relora" in (run_dir / "log.txt").read_text()
    assert train_here(tiny, back, f"checkpoint.init_from={run_dir}", "reparam.method=full", "train.steps=2") == 0
    assert evaluation(back, 0) == pytest.approx(evaluation(run_dir, 6), rel=1e-5)


def test_cola_cannot_be_converted(tiny: Path, finished: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = (f"checkpoint.init_from={finished}", "reparam.method=cola")
    assert train_here(tiny, tmp_path / "run", *arguments) == 2
    assert "a layer of cola has no weight that could be converted" in capsys.readouterr().err


def evaluation(run_dir: Path, step: int) -> float:
    return next(float(line["eval_loss"]) for line in metrics(run_dir) if "eval_loss" in line and line["step"] == step)
