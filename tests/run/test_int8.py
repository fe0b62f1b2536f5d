"""Whole runs with int8 weights: they learn as bf16 does, go on to the bit, end well when they diverge, are exported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sltrain_dist import cli
from sltrain_dist.checkpoint.manifest import list_checkpoints, read_manifest
from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.config.load import load_config
from sltrain_dist.models.build import build_model
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.build import build_engine
from tests.support.runs import Corpus, metrics, outcome, saved_steps, tiny_config, train_here, write_config

INT8 = ("reparam.weight_bits=8", "optim.state_bits=8", "optim.update=per_layer", "train.sanity_checks=true")


@pytest.fixture(scope="module")
def config(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 updates in bf16, in which the loss falls by more than a nat."""
    values = tiny_config(
        corpus,
        model={"hidden_size": 64, "intermediate_size": 96},
        reparam={"rank": 8},
        data={"batching": "pack"},
        optim={"lr": 0.004},
        train={"steps": 30, "micro_batch": 8, "dtype": "bf16"},
        eval={"every": 0},
        checkpoint={"every": 10},
    )
    return write_config(tmp_path_factory.mktemp("int8") / "config.yaml", values)


@pytest.fixture(scope="module")
def finished_int8(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("int8") / "run"
    assert train_here(config, run_dir, *INT8) == 0
    return run_dir


def eval_losses(run_dir: Path) -> list[float]:
    return [line["eval_loss"] for line in metrics(run_dir) if "eval_loss" in line]


def test_learns_as_with_bf16(config: Path, finished_int8: Path, tmp_path: Path) -> None:
    assert train_here(config, tmp_path / "usual", "optim.state_bits=8", "optim.update=per_layer") == 0
    usual, ours = eval_losses(tmp_path / "usual"), eval_losses(finished_int8)
    assert usual[-1] < usual[0] - 1
    assert 0 < abs(ours[-1] - usual[-1]) < 0.05
    assert "int8 (experimental)" in (finished_int8 / "log.txt").read_text()


def test_goes_on_to_the_bit_and_refuses_another_form(
    config: Path, finished_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = f"checkpoint.resume={finished_int8 / 'checkpoints' / 'step_00000010'}"
    assert train_here(config, tmp_path / "run", *INT8, resume) == 0
    newest = [list_checkpoints(run_dir / "checkpoints")[-1] for run_dir in (tmp_path / "run", finished_int8)]
    assert [step for step, _ in newest] == [30, 30]
    tensors = [read_manifest(path).files["tensors-00000-of-00001.safetensors"] for _, path in newest]
    assert tensors[0] == tensors[1]
    assert train_here(config, tmp_path / "other", *INT8, "reparam.weight_bits=16", resume) == 5
    assert "reparam.weight_bits: 8 → 16" in capsys.readouterr().err


def test_a_new_run_starts_from_int8_weights(config: Path, finished_int8: Path, tmp_path: Path) -> None:
    init_from = (f"checkpoint.init_from={finished_int8}", "seed=9", "train.steps=2")
    assert train_here(config, tmp_path, *INT8, *init_from) == 0
    assert eval_losses(tmp_path)[0] == eval_losses(finished_int8)[-1]


def test_is_verified_and_exported(finished_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sltrain(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sltrain", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    assert sltrain("verify", str(finished_int8)) == 0
    assert sltrain("export", str(finished_int8), "--output", str(tmp_path / "hf"), "--dtype", "fp32") == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    reader = CheckpointReader(sorted((finished_int8 / "checkpoints").iterdir())[-1])
    assert reader.shapes["model.lm_head.weight.codes"] == (320, 64)
    codes = reader.read("model.lm_head.weight.codes", 0, 320 * 64).view(320, 64)
    scales = reader.read("model.lm_head.weight.scales", 0, 320)
    assert codes.dtype == torch.int8
    assert torch.equal(exported["lm_head.weight"], codes * scales[:, None])
    model = _loaded(reader)
    name = "model.layers.1.mlp.up_proj"
    dense = model.get_submodule(name).dense_weight()
    torch.testing.assert_close(exported[f"{name}.weight"], dense.float(), rtol=2**-6, atol=1e-3)
    assert len(exported) == 3 + 2 * 9


def _loaded(reader: CheckpointReader) -> torch.nn.Module:
    config = load_config(reader.path / "config.yaml")
    engine = build_engine(build_model(config), config, Environment(0, 1, 0, torch.device("cpu")))
    engine.load(reader.read, 30)
    return engine.module


def test_divergence_ends_with_its_code(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    too_fast = ("optim.lr=1e36", "optim.clip=0", "optim.warmup_steps=0", "checkpoint.every=1")
    run_dir = tmp_path / "run"
    assert train_here(config, run_dir, *INT8, *too_fast) == 4
    error = capsys.readouterr().err
    assert outcome(run_dir)["code"] == 4
    assert "no checkpoint of it was saved" in error
    assert saved_steps(run_dir) == [], "a later start could not go on from it"
