"""What a user can get wrong: the exit code, a message that names it and says what to change, and exit.json."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.runs import (
    LAUNCH,
    Corpus,
    Process,
    documents,
    metrics,
    outcome,
    python,
    saved_steps,
    torchrun,
    train_here,
    write_shard,
)

Output = pytest.CaptureFixture[str]


def fails(tiny: Path, run_dir: Path, capsys: Output, code: int, *overrides: str) -> str:
    """Runs, checks how it ended, and returns the message."""
    assert train_here(tiny, run_dir, *overrides) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("error: ")
    assert error.count("error: ") == 1
    assert outcome(run_dir)["code"] == code
    assert outcome(run_dir)["reason"] == error.removeprefix("error: ").removesuffix("\n")
    return error


def shards_of(corpus: Corpus) -> list[Path]:
    return sorted(Path(corpus.train).parent.glob(Path(corpus.train).name))


class TestData:
    """Exit code 3."""

    def test_nothing_there(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        error = fails(tiny, tmp_path / "run", capsys, 3, f"data.source={tmp_path}/c4-train.json.gz")
        assert f"{tmp_path}/c4-train.json.gz" in error
        assert "data.source" in error

    def test_glob_that_matches_nothing(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        error = fails(tiny, tmp_path / "run", capsys, 3, f"data.source={tmp_path}/c4-*.gz")
        assert f"no file matches the glob '{tmp_path}/c4-*.gz'" in error
        assert "check data.source" in error

    def test_evaluation_data(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        error = fails(tiny, tmp_path / "run", capsys, 3, f"eval.source={tmp_path}/c4-*.gz")
        assert f"{tmp_path}/c4-*.gz" in error

    @pytest.mark.parametrize("workers", [0, 1])
    def test_corrupt_gzip(self, corpus: Corpus, tiny: Path, tmp_path: Path, capsys: Output, workers: int) -> None:
        content = shards_of(corpus)[0].read_bytes()
        broken = tmp_path / "broken.json.gz"
        broken.write_bytes(content[: len(content) // 2])
        error = fails(tiny, tmp_path / "run", capsys, 3, f"data.source={broken}", f"data.workers={workers}")
        assert str(broken) in error
        assert "must be replaced" in error

    def test_not_gzip_at_all(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        broken = tmp_path / "broken.json.gz"
        broken.write_bytes(b"<html>404</html>")
        assert str(broken) in fails(tiny, tmp_path / "run", capsys, 3, f"data.source={broken}")

    @pytest.mark.parametrize(
        ("lines", "cause"),
        [
            (b"not JSON\n" * 3, "not_json: "),
            (b'{"body": "text under another key"}\n' * 3, "no_text: "),
            (b'{"text": 7}\n' * 3, "no_text: "),
            (b'{"text": "\xff\xfe"}\n' * 3, "invalid_utf8: "),
            (b'{"text": " "}\n' * 3, "empty: "),
        ],
    )
    def test_too_many_bad_lines(self, tiny: Path, tmp_path: Path, capsys: Output, lines: bytes, cause: str) -> None:
        shard = tmp_path / "c4.json.gz"
        write_shard(shard, documents("few", 40), lines)
        error = fails(tiny, tmp_path / "run", capsys, 3, f"data.source={shard}", "train.steps=60")
        assert cause in error
        assert str(shard) in error
        assert "data.max_bad_fraction=0.01" in error
        assert "data.text_field='text'" in error

    @pytest.mark.parametrize("accepted", [0.01, 1.0])
    def test_only_empty_documents(self, tiny: Path, tmp_path: Path, capsys: Output, accepted: float) -> None:
        shard = tmp_path / "c4.json.gz"
        write_shard(shard, [""] * 30)
        overrides = (f"data.source={shard}", f"data.max_bad_fraction={accepted}")
        error = fails(tiny, tmp_path / "run", capsys, 3, *overrides)
        assert "documents cannot be used (empty: " in error or "no usable document" in error

    def test_tokenizer_that_is_none(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_text('{"version": "1.0"}')
        error = fails(tiny, tmp_path / "run", capsys, 3, f"data.tokenizer={path}")
        assert f"{path} is not a SentencePiece model" in error
        assert "data.tokenizer" in error

    def test_few_bad_lines_are_counted(self, tiny: Path, tmp_path: Path) -> None:
        shard = tmp_path / "c4.json.gz"
        write_shard(shard, documents("many", 96), b'not JSON\n\n{"body": "x"}\n{"text": "\xff"}\n')
        overrides = (f"data.source={shard}", "data.max_bad_fraction=0.1", "train.steps=14", "eval.source=null")
        assert train_here(tiny, tmp_path / "run", *overrides) == 0
        keys = [f"bad_documents_{cause}" for cause in ("not_json", "empty", "no_text", "invalid_utf8")]
        lines = metrics(tmp_path / "run")
        assert all(lines[-1][key] >= 1 for key in keys)
        for line, after in pairwise(lines):
            assert all(line.get(key, 0) <= after.get(key, 0) for key in keys)
        assert not set(keys) & lines[0].keys(), "a cause that has not occurred has no key"


class TestConfiguration:
    """Exit code 2."""

    def test_vocabulary_larger_than_the_models(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        error = fails(tiny, tmp_path / "run", capsys, 2, "model.vocab_size=299")
        assert "model.vocab_size = 299" in error
        assert "set model.vocab_size=300 or more" in error

    def test_batch_that_does_not_divide(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        (tmp_path / "run").mkdir()
        error = fails(tiny, tmp_path / "run", capsys, 2, "train.micro_batch=3")
        assert "train.micro_batch = 3" in error
        assert "train.global_batch = 8" in error

    def test_unknown_key(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        (tmp_path / "run").mkdir()
        error = fails(tiny, tmp_path / "run", capsys, 2, "train.stesp=9")
        assert "train.stesp" in error
        assert "did you mean train.steps?" in error

    def test_relora_without_merges(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        (tmp_path / "run").mkdir()
        error = fails(tiny, tmp_path / "run", capsys, 2, "reparam.method=relora")
        assert "reparam.method = 'relora' never merges its factors with reparam.restart_every = 0" in error

    def test_no_trace_of_a_run_that_never_was(self, tiny: Path, tmp_path: Path) -> None:
        assert train_here(tiny, tmp_path / "run", "train.stesp=9") == 2
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("place", ["{tmp}/file/run", "/proc/run"])
    def test_unwritable_run_dir(self, tiny: Path, tmp_path: Path, capsys: Output, place: str) -> None:
        (tmp_path / "file").touch()
        run_dir = Path(place.format(tmp=tmp_path))
        assert train_here(tiny, run_dir) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert f"error: run_dir = {run_dir} cannot be written to" in error
        assert "choose another" in error


@pytest.mark.parametrize(("lr", "engine"), [("1e10", "ddp"), ("1e20", "fsdp"), ("1e38", "ddp")])
def test_what_has_blown_up_is_not_saved(tiny: Path, tmp_path: Path, capsys: Output, lr: str, engine: str) -> None:
    """Exit code 4. The update itself was finite, but the next would not have been, nor that of any later start."""
    run_dir = tmp_path / "run"
    overrides = ("train.steps=3", "checkpoint.every=1", "optim.warmup_steps=0", f"parallel.engine={engine}")
    assert train_here(tiny, run_dir, *overrides, "train.steps=1") == 0
    error = fails(tiny, run_dir, capsys, 4, *overrides, "optim.clip=0", f"optim.lr={lr}")
    assert "no checkpoint of it was saved" in error
    assert "ower optim.lr" in error
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000001"]
    assert outcome(run_dir)["step"] == 1
    assert train_here(tiny, run_dir, *overrides) == 0, "the same command with a better learning rate goes on"
    assert saved_steps(run_dir) == [1, 2, 3]


def test_divergence(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """Exit code 4, and the update that would have spoiled the weights is not made."""
    run_dir, overrides = (
        tmp_path / "run",
        ("optim.clip=0", "optim.warmup_steps=0", "optim.lr=1e10", "checkpoint.every=0"),
    )
    error = fails(tiny, run_dir, capsys, 4, *overrides)
    assert "update 2 has loss nan" in error
    assert "was not made; there is no checkpoint yet" in error
    assert "Lower optim.lr" in error
    assert not saved_steps(run_dir)


def test_a_run_that_learns_nothing_is_told_so_and_what_was_good_is_kept(tiny: Path, tmp_path: Path) -> None:
    """Its loss stays finite, and its checkpoints would push the good ones out."""
    overrides = ("train.steps=9", "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=4")
    assert train_here(tiny, tmp_path / "good", *overrides, "eval.source=null") == 0
    assert saved_steps(tmp_path / "good") == [4, 8, 9]
    assert "no better than" not in (tmp_path / "good" / "log.txt").read_text()
    assert train_here(tiny, tmp_path / "bad", *overrides, "eval.source=null", "optim.lr=1e6") == 0
    assert saved_steps(tmp_path / "bad") == [4, 8, 9]
    log = (tmp_path / "bad" / "log.txt").read_text()
    assert "warning: after 9 updates the loss is 5.768, no better than at the start (5.782) or than guessing" in log
    assert "the newest 2 checkpoints are kept, and those of every 4 updates" in log


class Mistake(NamedTuple):
    """A mistake that is made with the real command."""

    ranks: int
    overrides: Sequence[str]
    code: int
    message: str


def test_real_processes(corpus: Corpus, tiny: Path, tmp_path: Path) -> None:
    """The codes as a shell sees them; with several ranks, one message and nothing of its consequences."""
    good, broken = tmp_path / "shards" / "a.json.gz", tmp_path / "shards" / "b.json.gz"
    write_shard(good, documents("good", 40))
    content = shards_of(corpus)[0].read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    mistakes = {
        "data": Mistake(1, [f"data.source={tmp_path}/no-*.gz"], 3, "no file matches the glob"),
        "key": Mistake(1, ["model.hiden_size=3"], 2, "did you mean model.hidden_size?"),
        # Of two streams and two shards, only one rank meets the broken file.
        "one rank": Mistake(2, [f"data.source={good.parent}", "data.streams=2"], 3, f"cannot read the shard {broken}"),
        "batch": Mistake(2, ["train.micro_batch=8"], 2, "times 2 ranks = 16; set for example"),
    }
    for name in mistakes:
        (tmp_path / name).mkdir()
    with ExitStack() as stack:
        alone = {
            name: stack.enter_context(python(tiny, tmp_path / name, *mistake.overrides))
            for name, mistake in mistakes.items()
            if mistake.ranks == 1
        }
        for name, (ranks, overrides, code, message) in mistakes.items():
            # One torchrun after the other: two that start at once may choose the same port.
            process = alone.get(name) or stack.enter_context(torchrun(tiny, tmp_path / name, *overrides))
            returned = process.wait()
            error = process.stderr
            assert returned == code if ranks == 1 else returned != 0, error
            assert outcome(tmp_path / name)["code"] == code, error
            assert message in outcome(tmp_path / name)["reason"]
            assert len(re.findall(f"^error: .*{re.escape(message)}", error, re.MULTILINE)) == 1, error
            # torchrun prints a traceback of its own.
            assert "sltrain_dist/train/run.py" not in error


def test_help_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    with Process([sys.executable, "-X", "importtime", LAUNCH, "--help"], tmp_path / "help") as process:
        assert process.wait() == 0
        assert "--config" in process.stdout
        assert "Exit codes: 0 done, 1 a crash" in process.stdout
        imported = re.findall(r"\| +([\w.]+)$", process.stderr, re.MULTILINE)
    assert "argparse" in imported
    assert not {"torch", "numpy", "pydantic", "deepspeed", "sltrain_dist"} & set(imported)


def test_missing_arguments(tmp_path: Path) -> None:
    with Process([sys.executable, LAUNCH], tmp_path / "none") as process:
        assert process.wait() == 2
        assert "--config" in process.stderr
