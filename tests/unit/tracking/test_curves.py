"""tracking/curves.py and `sltrain curve`: what is read, drawn, and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sltrain_dist import cli
from sltrain_dist.errors import ConfigError, DataError
from sltrain_dist.tracking.curves import MetricCurve, draw_text, read_curve


def run_of(path: Path, losses: list[float | str]) -> Path:
    """A run directory with a loss at every update, and an evaluation at every tenth."""
    path.mkdir()
    lines = []
    for step, loss in enumerate(losses, start=1):
        lines.append({"step": step, "tokens": 100 * step, "elapsed_s": 0.5 * step, "loss": loss})
        if step % 10 == 0:
            lines.append({"step": step, "tokens": 100 * step, "elapsed_s": 0.5 * step, "eval_loss": 2.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sltrain", "curve", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_a_metric_by_what_is_asked_for(tmp_path: Path) -> None:
    losses = [float(i) for i in range(20)]
    run = run_of(tmp_path / "run", losses)
    assert read_curve(run, "loss", "step") == MetricCurve(str(run), [float(i) for i in range(1, 21)], losses)
    assert read_curve(run, "eval_loss", "elapsed_s") == MetricCurve(str(run), [5.0, 10.0], [2.0, 2.0])


def test_many_lines_become_means_and_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [*map(float, range(1000)), "NaN"])
    curve = read_curve(run, "loss", "tokens")
    assert curve.x[:2] == [200.0, 500.0] and curve.y[:2] == [1.0, 4.0] and curve.y[-1] == 999.0
    assert len(curve.x) == len(curve.y) == 334


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [3.0, 2.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tokens": 300, "lo')
    assert read_curve(run, "loss", "step").y == [3.0, 2.0]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none/metrics\.jsonl: there is no such file; give the directory of a run"):
        read_curve(tmp_path / "none", "loss", "step")
    run = run_of(tmp_path / "run", [3.0])
    with pytest.raises(ConfigError, match="has no perplexity by step; it has elapsed_s, loss, step, tokens"):
        read_curve(run, "perplexity", "step")
    (run / "metrics.jsonl").write_text("{}}\n")
    with pytest.raises(DataError, match="is damaged"):
        read_curve(run, "loss", "step")


def test_text_hides_the_first_fall_and_names_several_curves() -> None:
    falling = [9.0, 8.0, *[3.0 - 0.1 * i for i in range(18)]]
    one, other = (MetricCurve(name, [float(i) for i in range(20)], falling) for name in ("one", "other"))
    alone = draw_text([one], "loss", "step", 60, 20)
    assert "3.00" in alone and "9.00" not in alone and "one" not in alone
    assert max(map(len, alone.splitlines())) <= 60 and len(alone.splitlines()) <= 20
    both = draw_text([one, other], "loss", "step", 60, 20)
    assert "aa one" in both and "bb other" in both
    assert "9.0" in draw_text([one], "lr", "step", 60, 20)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run_of(tmp_path / name, [3.0, 2.0, 1.5])) for name in ("a", "b")]
    assert command(monkeypatch, *runs, "--by", "step") == 0
    assert "step" in capsys.readouterr().out
    picture = tmp_path / "loss.png"
    assert command(monkeypatch, *runs, "--output", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == f"written: {picture}\n"
    assert command(monkeypatch, str(tmp_path)) == 3
    assert command(monkeypatch, runs[0], "--metric", "bits") == 2
    assert command(monkeypatch, runs[0], "--output", str(tmp_path / "none" / "x.png")) == 6
