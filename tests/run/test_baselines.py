"""Whole runs of the published baselines: resumed in their middle, they go on to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support.runs import Corpus, final_tensors, metrics, tiny_config, train_here, trajectory, write_config

STEPS, FIRST = 6, 3

RUNS = {
    "cola": ("reparam.method=cola",),
    "galore, per layer, 8 bits": ("reparam.method=galore", "optim.update=per_layer", "optim.state_bits=8"),
    "apollo": ("reparam.method=apollo",),
    "apollo-mini": ("reparam.method=apollo-mini",),
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_resumed_equals_uninterrupted(corpus: Corpus, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """From between two projections, which are new in the updates 1, 3 and 5, on to one."""
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
    resume = f"checkpoint.resume={whole / 'checkpoints' / f'step_{FIRST:08}'}"
    assert train_here(config, again, *settings, resume) == 0
    assert final_tensors(again) == final_tensors(whole)
    assert trajectory(again)[-1] == trajectory(whole)[-1]
