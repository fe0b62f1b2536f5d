"""tools/bench_linear.py, and the options that the benchmarks share."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import pytest

from sltrain_dist.config import presets
from tests.support.paths import REPO

sys.path.insert(0, str(REPO / "tools"))

import bench_linear
from benchmarking import positive, sizes, some_of

TINY: dict[str, Any] = {
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2},
    "reparam": {"rank": 4, "density": 0.1},
    "train": {"steps": 1},
}
ARGUMENTS = ["bench_linear.py", "--shapes", "60m,60m", "--tokens", "8", "--repeats", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setitem(presets.PRESETS, "llama_60m", TINY)
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, *arguments])
    bench_linear.main()


@pytest.mark.parametrize("methods", ["dense,blocks auto", "blocks auto, dense,dense", "blocks auto"])
def test_dense_may_be_named_and_is_there_anyway(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], methods: str
) -> None:
    run(monkeypatch, "--methods", methods, "--json")
    (result,) = json.loads(capsys.readouterr().out)["presets"].values()
    assert [row["method"] for row in result["block"]] == ["dense", "blocks auto"]
    run(monkeypatch, "--methods", methods)
    assert "| blocks auto |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "densee"], "unknown 'densee'; choose from dense, published, random materialize"),
        (["--shapes", "2b"], "unknown '2b'; choose from 60m, 130m, 350m, 1b, 7b"),
        (["--tokens", "0"], "'0' should be a whole number above 0"),
        (["--repeats", "x"], "'x' should be a whole number above 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_options() -> None:
    assert sizes() == ["60m", "130m", "350m", "1b", "7b"]
    assert some_of(["a", "b"])("b, a,b") == ["b", "a"] and positive("3") == 3
    for text in ("-1", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            positive(text)
