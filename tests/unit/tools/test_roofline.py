"""tools/roofline.py and tools/bench_routes.py: what they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sltrain_dist.sparse_lowrank import functional
from tests.support.paths import REPO

sys.path.insert(0, str(REPO / "tools"))

import bench_linear
import bench_routes
import roofline


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    tool.main()


def test_the_table_of_the_docs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(roofline, monkeypatch)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1b", "| 7b"))]
    page = (REPO / "docs/operator.md").read_text()
    assert len(rows) == 8 and "\n".join(rows) in page


def test_json_has_every_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(roofline, monkeypatch, "--shapes", "60m", "--devices", "H200,AVX2", "--support", "random", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 * 7
    assert all(row["dense_s"] > 0 and row["auto"] in ("materialize", "factored") for row in rows)


def test_measured_rows_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(functional, "route_at", functional.route_at)  # which the tool replaces: undone after the test
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(bench_routes, "groups_of", lambda preset: ([bench_linear.Group(("q",), 32, 48)], 4, 0.1, 1.0))
    run(bench_routes, monkeypatch, "--tokens", "8", "--repeats", "1", "--device", "AVX2")
    file = tmp_path / "rows.jsonl"
    file.write_text(capsys.readouterr().out)
    run(roofline, monkeypatch, "--measured", str(file))
    assert "| AVX2, fp32, 1 | 9 |" in capsys.readouterr().out
