"""Runs that start from the weights of another run's checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from sltrain_dist.data.tokenizer import train_tokenizer
from sltrain_dist.hub.export import export_dense
from sltrain_dist.parallel.ddp import DDPEngine
from tests.support.runs import documents, final_tensors, metrics, outcome, saved_steps, train_here, trajectory

Output = pytest.CaptureFixture[str]
BRANCH = (
    "seed=9",
    "optim.lr=0.005",
    "optim.warmup_steps=1",
    "optim.state_bits=8",
    "data.shuffle_block=8",
    "checkpoint.every=3",
)
"""Another data order, seed, schedule and kind of optimizer states than those of the checkpoint."""


@pytest.fixture(scope="module")
def dense(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with dense weights."""
    run_dir = tmp_path_factory.mktemp("dense") / "run"
    assert train_here(tiny, run_dir, "reparam.method=full") == 0
    return run_dir


def evaluations(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in metrics(run_dir) if "eval_loss" in line}


def support_seed(run_dir: Path) -> int | None:
    seed: int | None = yaml.safe_load((run_dir / "config.yaml").read_text())["reparam"]["support_seed"]
    return seed


def test_a_new_run_begins_where_the_checkpoint_was(finished: Path, tiny: Path, tmp_path: Path) -> None:
    """With its loss and its supports; with a step count, an optimizer and data of its own; and so does a third run."""
    run_dir, third = tmp_path / "run", tmp_path / "third"
    assert train_here(tiny, run_dir, f"checkpoint.init_from={finished}", *BRANCH) == 0
    assert evaluations(run_dir)[0] == evaluations(finished)[6]
    assert [line["step"] for line in metrics(run_dir) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert evaluations(run_dir)[6] < evaluations(run_dir)[0]
    assert (support_seed(finished), support_seed(run_dir)) == (None, 3)
    log = (run_dir / "log.txt").read_text()
    assert f"weights to start from: {finished}/checkpoints/step_00000006, after 6 updates" in log
    assert export_dense(run_dir, tmp_path / "model") > 0, "which compares the supports"
    assert train_here(tiny, third, f"checkpoint.init_from={run_dir}", "seed=10", "train.steps=2") == 0
    assert evaluations(third)[0] == evaluations(run_dir)[6]
    assert support_seed(third) == 3


@pytest.mark.parametrize("method", ["sltrain", "full"])
def test_killed_before_its_first_checkpoint_and_after_it(
    finished: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It starts from the same weights again; and once it has a checkpoint, it needs the other run's no more."""
    source = Path(shutil.copytree(finished, tmp_path / "source"))
    branch = (f"checkpoint.init_from={source}", f"reparam.method={method}", *BRANCH)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_here(tiny, whole, *branch) == 0
    update, made = DDPEngine.update, []

    def dying(engine: DDPEngine) -> None:
        made.append(1)
        if len(made) in (3, 3 + 5):  # of the second start, the fifth
            raise RuntimeError("killed")
        update(engine)

    monkeypatch.setattr(DDPEngine, "update", dying)
    assert train_here(tiny, broken, *branch) == 1
    assert saved_steps(broken) == []
    assert train_here(tiny, broken, *branch) == 1
    assert saved_steps(broken) == [3]
    shutil.rmtree(source)
    assert train_here(tiny, broken, *branch) == 0
    assert trajectory(broken) == trajectory(whole)
    assert final_tensors(broken) == final_tensors(whole)
    log = (broken / "log.txt").read_text()
    assert log.count("weights to start from: ") == 2
    assert log.count(f"checkpoint.init_from = {source} is ignored, because the run resumes") == 1
    assert not (broken / "initial_weights").exists()


def test_dense_to_sparse_plus_low_rank_and_back(dense: Path, tiny: Path, tmp_path: Path) -> None:
    run_dir, back = tmp_path / "run", tmp_path / "back"
    assert train_here(tiny, run_dir, f"checkpoint.init_from={dense}", "seed=9", "reparam.rank=24") == 0
    assert evaluations(run_dir)[0] == pytest.approx(evaluations(dense)[6], rel=0.02)
    assert support_seed(run_dir) is None, "its supports are its own"
    log = (run_dir / "log.txt").read_text()
    assert "another setting than these weights had: reparam.method: 'full' in the checkpoint, 'sltrain' here" in log
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert f"{name}: converted with a relative error of 0." in log
    assert "converted 14 linear layers from full to sltrain" in log

    assert train_here(tiny, back, f"checkpoint.init_from={run_dir}", "reparam.method=full") == 0
    assert evaluations(back)[0] == pytest.approx(evaluations(run_dir)[6], rel=1e-5)


def test_what_cannot_be_started_from(
    finished: Path, tiny: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: int, *overrides: str) -> str:
        assert train_here(tiny, tmp_path / "new", *overrides) == code
        assert outcome(tmp_path / "new")["code"] == code or "train.dry_run=true" in overrides
        return capsys.readouterr().err

    missing = f"checkpoint.init_from={tmp_path}/none"
    assert f"checkpoint.init_from = {tmp_path}/none: {tmp_path}/none is not a checkpoint" in refused(5, missing)
    assert "is not a checkpoint" in refused(5, missing, "train.dry_run=true")
    source = f"checkpoint.init_from={finished}"
    assert "reparam.rank: 6 in the checkpoint, 5 here" in refused(2, source, "reparam.rank=5")
    train_tokenizer(documents("another", 200), tmp_path / "another.model", vocab_size=300)
    error = refused(2, source, f"data.tokenizer={tmp_path}/another.model")
    assert f"set data.tokenizer={finished}/checkpoints/step_00000006/tokenizer.model" in error
    damaged = Path(shutil.copytree(finished / "checkpoints" / "step_00000006", tmp_path / "step_00000006"))
    next(damaged.glob("*.safetensors")).write_bytes(b"")
    assert "has 0 bytes instead of" in refused(5, f"checkpoint.init_from={damaged}")
    assert train_here(tiny, tmp_path / "new", source, "train.dry_run=true") == 0
