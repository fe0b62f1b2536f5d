"""Whole runs with low-bit optimizer states: they learn as with 32 bits, go on to the bit, and what cannot be is
refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from sltrain_dist.checkpoint.manifest import list_checkpoints, read_manifest
from sltrain_dist.checkpoint.store import CheckpointReader
from sltrain_dist.numerics import blockwise
from sltrain_dist.optim import state_layout

from .helpers import REPO, Corpus, metrics, tiny_config, train_here, write_config

WIDTHS = {8: 0.02, 4: 0.05}
"""Most nats of validation loss that the states of so many bits may be away from those of 32."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_states", REPO / "tools" / "compare_states.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _small_parameters_are_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_layout, "QUANTIZED_FROM", 256)


@pytest.fixture(scope="module")
def config(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 updates, in which the loss falls by more than two nats."""
    values = tiny_config(
        corpus,
        model={"hidden_size": 64, "intermediate_size": 96},
        reparam={"rank": 8},
        data={"batching": "pack"},
        train={"steps": 30, "micro_batch": 8},
        eval={"every": 0},
        checkpoint={"every": 0},
    )
    return write_config(tmp_path_factory.mktemp("states") / "config.yaml", values)


def losses(tool: ModuleType, capsys: pytest.CaptureFixture[str], config: Path, *bits: str) -> dict[int, float]:
    assert tool.main(["--config", str(config), "--bits", *bits, "--seeds", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {row["bits"]: row["eval_loss"] for row in rows}


def test_learns_as_with_32_bits(
    tool: ModuleType, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = losses(tool, capsys, config, "8", "4")
    assert found[32] < 4.5  # a model that knows nothing has log 320 = 5.8
    for bits, most in WIDTHS.items():
        assert 0 < abs(found[bits] - found[32]) < most

    # Negative control: second moments that may be rounded to zero, as most of a block then are.
    monkeypatch.setattr(blockwise, "unsigned_levels", lambda bits: [i / 15 for i in range(16)])
    monkeypatch.setattr(blockwise, "_made", {})
    broken = losses(tool, capsys, config, "4")
    assert broken[32] == found[32]
    assert not abs(broken[4] - found[32]) < WIDTHS[4]


def test_goes_on_to_the_bit_and_refuses_another_form(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = ("optim.state_bits=4", "train.dtype=bf16", "optim.stochastic_rounding=true", "train.steps=8")
    schedule = ("optim.schedule=constant", "checkpoint.every=4")
    assert train_here(config, tmp_path / "whole", *form, *schedule) == 0
    assert train_here(config, tmp_path / "parts", *form, *schedule, "train.steps=4") == 0
    assert train_here(config, tmp_path / "parts", *form, *schedule, "optim.state_bits=8") == 5
    assert "optim.state_bits: 4 → 8" in capsys.readouterr().err
    assert train_here(config, tmp_path / "parts", *form, *schedule) == 0
    whole, parts = (list_checkpoints(tmp_path / name / "checkpoints")[-1][1] for name in ("whole", "parts"))
    tensors = "tensors-00000-of-00001.safetensors"
    assert read_manifest(whole)["files"][tensors] == read_manifest(parts)["files"][tensors]
    assert "optim.lm_head.weight.exp_avg.codes" in CheckpointReader(whole).shapes
    assert metrics(tmp_path / "parts")[-1]["step"] == 8


def test_zero_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(config, tmp_path / "run", "optim.state_bits=8", "parallel.engine=zero") == 2
    assert "set parallel.engine=fsdp or ddp" in capsys.readouterr().err
