"""tools/bench_memory.py: what it counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.models.count import parameter_bytes, parameter_shapes
from sltrain_dist.optim import low_bit

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from bench_memory import LiveBytes, live_peak


def test_live_bytes_come_and_go() -> None:
    kept = torch.zeros(1000)
    with LiveBytes() as tracker:
        tracker.add([kept])
        first = torch.ones(500) + 1  # two of 2 kB for a moment
        view = first[10:]
        del first
        assert tracker.live == 4000 + 2000  # the view keeps its storage
        del view
        assert tracker.live == 4000
    assert tracker.peak == 4000 + 4000


def config_of(reparam: dict[str, Any], **optim: Any) -> Config:
    return build_config(
        {
            "model": {
                "vocab_size": 64,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_layers": 2,
                "num_heads": 2,
            },
            "reparam": {"rank": 8, "density": 0.1, **reparam},
            "data": {"seq_len": 16},
            "optim": optim,
            "parallel": {"engine": "ddp"},
            "train": {"steps": 1, "micro_batch": 1, "global_batch": 1, "dtype": "bf16"},
        }
    )


PER_LAYER = {"state_bits": 8, "update": "per_layer"}


@pytest.mark.parametrize(
    ("reparam", "optim"), [({}, {"state_bits": 16}), ({}, PER_LAYER), ({"weight_bits": 8}, PER_LAYER)], ids=str
)
def test_fake_tensors_take_what_real_ones_take(
    reparam: dict[str, Any], optim: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for span in ("_SPAN", "_SPAN_CPU"):
        monkeypatch.setattr(low_bit, span, 1024)  # so that a parameter takes several
    config = config_of(reparam, **optim)
    real, fake = (live_peak(config, fake=fake) for fake in (False, True))
    assert real == fake
    assert real.other > 0
    shapes = parameter_shapes(config.model, config.reparam)
    assert real.parameters == sum(parameter_bytes(name, shape, config.reparam, 2) for name, shape in shapes)
