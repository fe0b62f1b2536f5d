"""Runs as a newcomer starts them: the `sltrain` command, a home directory, an old terminal, a saved plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sltrain_dist import cli
from tests.support.runs import Process, outcome, saved_steps, train_here


def test_sltrain_train_in_a_home_directory_on_a_latin_1_terminal(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "sltrain_dist", "--local_rank=0", "train", "--config", str(tiny)]
    with Process([*command, "run_dir=~/runs/x"], tmp_path / "out") as process:
        assert process.wait() == 0, process.stderr
        shown = (tmp_path / "out.out").read_bytes()
    run_dir = tmp_path / "runs" / "x"
    assert outcome(run_dir)["code"] == 0 and saved_steps(run_dir)[-1] == 6
    assert not (tmp_path / "~").exists()
    assert f"run_dir: {run_dir}\n" in (run_dir / "config.yaml").read_text(encoding="utf-8")
    assert "→" in (run_dir / "log.txt").read_text(encoding="utf-8") and b" ? " in shown


def test_a_saved_plan_runs_as_it_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["--search", "--vary", "update", "--vary", "support", "--rows", "1", "--save", str(tmp_path / "plans")]
    monkeypatch.setattr(sys, "argv", ["sltrain", "plan", "--config", str(tiny), "parallel.engine=ddp", *search])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert f"sltrain train --config {tmp_path}/plans/plan-01.yaml" in capsys.readouterr().out
    assert train_here(tmp_path / "plans" / "plan-01.yaml", tmp_path / "run") == 0
    assert outcome(tmp_path / "run")["step"] == 6
