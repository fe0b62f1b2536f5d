"""tools/bench_updates.py: that it times both kinds of updates, and what it reports of the times."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from sltrain_dist.config import presets
from sltrain_dist.parallel.per_layer import InBackward
from tests.support.paths import REPO

sys.path.insert(0, str(REPO / "tools"))

import bench_updates
from benchmarking import Seconds

TINY = {
    "model": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2},
    "reparam": {"rank": 4, "density": 0.1},
    "train": {"steps": 10},
}
ARGUMENTS = ["--preset", "60m", "--micro-batch", "2", "--seq-len", "8", "--repeats", "3"]


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "llama_60m", TINY)


def test_costs_are_of_seconds_turn_by_turn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios are taken within a turn: a slow spell of the machine, here the second turn, hits both alike."""
    made_up = {
        "whole": [Seconds(1.0, 0.5), Seconds(10.0, 0.5), Seconds(2.0, 0.5)],
        "per_layer": [Seconds(1.1, 0.5), Seconds(12.0, 0.6), Seconds(2.1, 0.55)],
    }
    monkeypatch.setattr(bench_updates, "interleaved", lambda *_, **__: made_up)
    assert bench_updates.main([*ARGUMENTS, "--dtypes", "fp32", "--state-bits", "16", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    wall = {"whole_s": 2.0, "per_layer_s": 2.1, "cost": 0.1, "cost_min": 0.05, "cost_max": 0.2}
    assert row["wall"] == pytest.approx(wall)
    assert row["cpu"]["cost"] == pytest.approx(0.1)
    assert (row["whole_tokens_per_s"], row["per_layer_tokens_per_s"]) == pytest.approx((16 / 2.0, 16 / 2.1))


def test_both_kinds_of_updates_train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    run = InBackward.run

    def counted(self: InBackward, backward: Any, *, last: bool) -> torch.Tensor:
        passes.append(last)
        return run(self, backward, last=last)

    monkeypatch.setattr(InBackward, "run", counted)
    assert bench_updates.main(ARGUMENTS) == 0
    assert capsys.readouterr().out.count("%") == 4 * 6
    assert passes == [True] * 4 * (1 + 3)  # two types, two widths of states, warm-up and repeats
