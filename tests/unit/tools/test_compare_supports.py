"""tools/compare_supports.py, on made-up text."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.paths import REPO

SENTENCE = "sparse plus low rank layers train well when their support is drawn at random or laid out in blocks"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_supports", REPO / "tools" / "compare_supports.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents, in which a word makes the next one likely."""
    path = tmp_path_factory.mktemp("text") / "made-up.json.gz"
    draw = random.Random(0)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for _ in range(200):
            start = draw.randrange(len(WORDS))
            words = [WORDS[(start + i) % len(WORDS)] for i in range(draw.randrange(20, 60))]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    model = "--vocab 320 --layers 1 --hidden 32 --intermediate 48 --heads 2 --rank 4 --densities 0.125"
    data = f"--text {text} --out {out} --seq 16 --batch 8 --tokens 1280 --valid-tokens 256"
    return [*model.split(), *data.split(), "--json", *more]


def table(tool: ModuleType, capsys: pytest.CaptureFixture[str], args: list[str]) -> dict[str, dict[str, Any]]:
    assert tool.main(args) == 0
    return {row["support"]: row for row in json.loads(capsys.readouterr().out)}


def test_learns_and_reports_the_spread_and_repeats_nothing(
    tool: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    supports = ["random", "stratified", "blocks", "blocks:grouped", "lowrank", "full"]
    args = arguments(text, tmp_path, "--supports", *supports, "--seeds", "0", "1", "--lrs", "0.02")
    rows = table(tool, capsys, args)
    assert list(rows) == supports
    for row in rows.values():
        assert row["seeds"] == 2
        assert row["min"] < row["perplexity"] < row["max"] < 160  # a model that knows nothing has 320
    assert rows["random"]["density"] == rows["blocks"]["density"] == 0.125
    assert rows["lowrank"]["density"] == 0
    perplexities = {rows[name]["perplexity"] for name in supports}
    assert len(perplexities) == len(supports)  # every support, and every permutation, is a run of its own
    assert len(list(tmp_path.glob("*.json"))) == 12

    monkeypatch.setattr(tool, "train", lambda *_: pytest.fail("a finished run was repeated"))
    assert table(tool, capsys, args) == rows
    assert tool.main([arg for arg in args if arg != "--json"]) == 0
    assert "blocks:grouped" in capsys.readouterr().out


def test_a_seed_gives_the_same_run_again_and_other_settings_another(
    tool: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def perplexity(out: str, *more: str) -> float:
        args = arguments(text, tmp_path / out, "--supports", "blocks", "--seeds", "3", *more)
        return float(table(tool, capsys, args)["blocks"]["perplexity"])

    first = perplexity("a")
    assert perplexity("b") == first
    assert perplexity("a", "--batch", "4") != first
    assert perplexity("a", "--clip", "0.01") != first
    assert perplexity("a", "--autocast") == pytest.approx(first, rel=0.02)
    assert len(list((tmp_path / "a").glob("*.json"))) == 4


def test_what_is_held_out_is_never_trained_on(tool: ModuleType, text: Path) -> None:
    documents, held_out = tool.split_documents([str(text)])
    assert (len(documents), len(held_out)) == (196, 4)
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert held_out == [texts[i] for i in (0, 50, 100, 150)]
    assert documents == [each for i, each in enumerate(texts) if i not in (0, 50, 100, 150)]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--supports", "blocks:sorted"], 2, "blocks:natural"),
        (["--supports", "random", "--rank", "64"], 2, "at most 32"),
        (["--tokens", "1000000"], 3, "lower --tokens"),
        (["--text", "nothing-here-*.gz"], 3, "nothing-here"),
        (["--text", __file__], 3, "not gzipped JSON lines"),
        (["--vocab", "100000"], 2, "--vocab 100000"),
    ],
)
def test_bad_input(
    tool: ModuleType,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
) -> None:
    assert tool.main(arguments(text, tmp_path, *more)) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
