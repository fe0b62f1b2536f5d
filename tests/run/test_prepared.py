"""`sltrain prepare-tokens` killed and started again, and a run on what it made."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from backports import zstd

from sltrain_dist.data.prepare.make_corpus import PrepareOptions, prepare_files
from sltrain_dist.data.prepare.tokens import prepare_tokens
from sltrain_dist.data.sources.resolve import resolve_source
from sltrain_dist.data.sources.token_shards import MANIFEST
from sltrain_dist.errors import DataError
from tests.support.runs import Corpus, Process, documents, metrics, outcome, train_here, trajectory, write_shard
from tests.unit.data.sources.test_token_shards import verify

SLTRAIN = [sys.executable, "-m", "sltrain_dist.cli"]


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of shards, whose processes outlive it for a moment, while the next command has begun."""
    texts = documents("text", 100)
    for number, copies in enumerate((1, 60, 60, 40)):
        write_shard(tmp_path / "text" / f"{number}.json.gz", texts * copies)
    output, whole = tmp_path / "tokens", tmp_path / "whole"
    source = f"{tmp_path}/text/*.json.gz"
    arguments = ["prepare-tokens", "--tokenizer", str(corpus.tokenizer), "-i", source, "--processes", "2"]
    with Process([*SLTRAIN, *arguments, "-o", output], tmp_path / "killed") as process:
        process.until(lambda: (output / "00000.shard.json").exists(), "the first shard")
        process.until(lambda: any(path.stat().st_size for path in output.glob(".*.tmp")), "a part of another one")
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        made = len(list(output.glob("*.shard.json")))
        assert 1 <= made < 4
        with pytest.raises(DataError, match="not finished"):
            resolve_source(str(output))
        with Process([*SLTRAIN, *arguments, "-o", output], tmp_path / "again") as again:
            assert again.wait() == 0, again.stderr
    prepare_tokens(resolve_source(source), whole, corpus.tokenizer)
    names = {path.name for path in whole.iterdir()}
    # Hidden files may be of a process that has just outlived the killed command.
    assert {path.name for path in output.iterdir() if not path.name.startswith(".")} == names
    assert len(names) == 9
    for name in names:
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert verify(monkeypatch, output) == 0


def test_a_run_on_a_prepared_corpus(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its directory is training data and validation data at once; a shard that is replaced is noticed at the resume."""
    texts = tmp_path / "x.jsonl.zst"
    texts.write_bytes(zstd.compress("".join(json.dumps({"text": text}) + "\n" for text in documents("x", 90)).encode()))
    corpus = tmp_path / "mine"
    options = PrepareOptions(clean=False, dedup=False, validation_fraction=0.2, num_shards=1)
    kept = prepare_files([str(texts)], corpus, options)
    source = (f"data.source={corpus}", f"eval.source={corpus}", "data.workers=1")
    assert train_here(tiny, tmp_path / "run", *source, "train.steps=4") == 0
    lines = metrics(tmp_path / "run")
    read = json.loads(next((tmp_path / "run" / "checkpoints").glob("step_*/state.json")).read_text())["data"]
    assert read["order"]["data.source"].startswith("1 files")
    assert 0 < lines[-1]["eval_tokens"] < 24 * (kept.splits["validation"].documents + 1)
    (shard,) = corpus.glob("*train*")
    content = bytearray(shard.read_bytes())
    content[4] ^= 1  # the date in gzip's header
    shard.write_bytes(content)
    capsys.readouterr()
    assert train_here(tiny, tmp_path / "run", *source, "train.steps=6") == 5
    error = capsys.readouterr().err
    assert f"contents of data.source (changed: {shard})" in error
    assert outcome(tmp_path / "run")["code"] == 5


def test_a_run_on_token_shards_is_the_run_on_their_text(
    corpus: Corpus, tiny: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_tokens(resolve_source(corpus.train), tmp_path / "tokens", corpus.tokenizer)
    assert len(json.loads((tmp_path / "tokens" / MANIFEST).read_text())["shards"]) == 3
    assert train_here(tiny, tmp_path / "run", f"data.source={tmp_path / 'tokens'}") == 0
    assert trajectory(tmp_path / "run") == trajectory(finished)
    assert outcome(tmp_path / "run")["code"] == 0
    assert "tokens  (3 shards)" in " ".join(capsys.readouterr().out.split("\n")).replace(" │", "")
