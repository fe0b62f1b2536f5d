"""A checkpoint that an earlier version made, kept as it was: this version goes on from it with the same losses.

It was made by commit 316dd32: a model of two layers after six of twelve updates, and updates.json is what that version
logged of the other six.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.runs import documents, metrics, train_here

KEPT = Path(__file__).parent / "checkpoint_2026_11"


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the shards are named as they were then
    for shard in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in documents(f"train-{shard}", 60)]
        Path(f"train-{shard}.jsonl").write_text("".join(lines))
    checkpoint = KEPT / "step_00000006"
    shutil.copy(checkpoint / "tokenizer.model", "tokenizer.model")
    shutil.copytree(checkpoint, Path("run/checkpoints") / checkpoint.name)
    assert train_here(checkpoint / "config.yaml", Path("run")) == 0
    expected = json.loads((KEPT / "updates.json").read_text())
    made = [line for line in metrics(Path("run")) if "loss" in line]
    assert [line["step"] for line in made] == [line["step"] for line in expected] == list(range(7, 13))
    for line, then in zip(made, expected, strict=True):
        assert line["tokens"] == then["tokens"]
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(then[key], rel=1e-4)
