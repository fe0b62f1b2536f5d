"""Whole studies: `sltrain study` with its processes, stopped, resumed and read."""

from __future__ import annotations

import csv
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Corpus, Process, metrics, outcome, saved_steps, tiny_config, train_here, trajectory
from tests.support.studies import write_study


@pytest.fixture
def values(corpus: Corpus, tmp_path: Path) -> dict[str, Any]:
    """A study of two arms, two learning rates and two seeds, with about 24 updates to tune and 8 to report."""
    base = tiny_config(corpus, checkpoint={"every": 5})
    base["train"].pop("steps")
    base["optim"].pop("lr")
    base.pop("seed")
    return {
        "study_dir": str(tmp_path / "study"),
        "base": base,
        "arms": {"full": {"reparam.method": "full"}, "sltrain": None},
        "lrs": [0.01, 0.003],
        "seeds": [1, 2],
        "budgets": [8 * 150],
        "tuning_tokens": 24 * 150,
        "reference": "full",
    }


def study(file: Path, *arguments: str) -> Process:
    return Process([sys.executable, "-m", "sltrain_dist", "study", file, *arguments], file.parent / "process")


def rows_of(directory: Path) -> dict[str, dict[str, str]]:
    with (directory / "results.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_a_study_that_is_stopped_goes_on_and_ends_with_the_same_results(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, directory = write_study(tmp_path / "study.yaml", values), tmp_path / "study"
    first = directory / "runs" / "full-3600-lr0.01-seed0"
    with study(file, "--jobs", "2") as process:
        process.until(lambda: 5 in saved_steps(first), "a checkpoint")
        process.send(signal.SIGTERM)
        assert process.wait() == 75
        assert "received SIGTERM: " in process.stderr and "stopped early with everything saved" in process.stderr
    stopped_at = outcome(first)
    assert stopped_at["code"] == 75 and 5 <= stopped_at["step"] < 24, "it was to be stopped half-way"

    with study(file, "--jobs", "2", "--json") as process:
        assert process.wait() == 0, process.stderr
        found = json.loads(process.stdout)
        assert "resumed: full, 3,600 tokens, lr 0.01, seed 0\n" in process.stderr
        assert "8 of 8: " in process.stderr
    rows = rows_of(directory)
    assert len(rows) == 8 and found["failed"] == []
    for name, row in rows.items():
        lines = metrics(directory / "runs" / name)
        assert (row["status"], row["exit_code"]) == ("done", "0")
        assert float(row["eval_loss"]) == lines[-1]["eval_loss"]
        assert float(row["eval_perplexity"]) == lines[-1]["eval_perplexity"]
        assert int(row["peak_memory_bytes"]) == max(line.get("peak_memory_bytes", 0) for line in lines)
    assert len({row["eval_tokens"] for row in rows.values()}) == 1
    for arm in found["arms"]:
        of_arm = [row for row in rows.values() if row["arm"] == arm["arm"]]
        tuning = {float(row["lr"]): float(row["eval_loss"]) for row in of_arm if row["role"] == "tuning"}
        reported = [row for row in of_arm if row["role"] == "reported"]
        assert arm["lr"] == min(tuning, key=tuning.__getitem__)
        assert [(row["seed"], float(row["lr"])) for row in reported] == [("1", arm["lr"]), ("2", arm["lr"])]
        assert arm["perplexity"]["mean"] == pytest.approx(sum(float(row["eval_perplexity"]) for row in reported) / 2)

    # The stopped trial, and one of the other arm's, as ordinary runs that nobody stops.
    for name in (first.name, *(name for name, row in rows.items() if row["arm"] == "sltrain" and row["seed"] == "2")):
        assert train_here(directory / "runs" / name / "config.yaml", tmp_path / name) == 0
        assert trajectory(tmp_path / name) == trajectory(directory / "runs" / name)

    # The same batches in both arms, whose padding gives every update another number of tokens.
    batches: dict[str, list[list[int]]] = {}
    for name, row in rows.items():
        batches.setdefault(row["seed"], []).append(
            [line["tokens"] for line in metrics(directory / "runs" / name) if "tokens" in line]
        )
    assert [len(each) for each in batches.values()] == [4, 2, 2]
    assert all(tokens == each[0] for each in batches.values() for tokens in each)
    assert batches["1"][0] != batches["2"][0]

    before = {path: path.read_bytes() for path in directory.iterdir() if path.suffix in (".csv", ".md")}
    with study(file) as process:
        assert process.wait() == 0 and process.stderr == ""
        assert process.stdout.splitlines()[0].startswith("| arm ") and "loss minus full" in process.stdout
    assert {path: path.read_bytes() for path in before} == before

    with study(file, "--dry-run") as process:
        assert process.wait() == 0
        assert f"done        {first.name}\n" in process.stdout and "8 of 8 trials are done\n" in process.stdout


def test_an_arm_that_diverges_is_a_result_and_one_that_fails_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"seeds": [1], "lrs": [0.01]}
    nowhere = str(tmp_path / "nowhere")
    values["arms"] = {"full": {"reparam.method": "full"}, "wild": {"lrs": [1e30]}}
    values["arms"]["broken"] = {"checkpoint.init_from": nowhere}
    file, directory = write_study(tmp_path / "study.yaml", values), tmp_path / "study"
    with study(file, "--jobs", "2", "--threads", "1") as process:
        assert process.wait() == 1
        (line,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
        table = process.stdout
    assert line.startswith("error: failed: broken-1200-lr0.01-seed1: exit code 5: ") and nowhere in line
    assert nowhere in (directory / "runs" / "broken-1200-lr0.01-seed1" / "output.txt").read_text()
    rows = {row["arm"]: row for row in rows_of(directory).values()}
    assert {arm: row["status"] for arm, row in rows.items()} == {"full": "done", "wild": "diverged", "broken": "failed"}
    assert rows["wild"]["eval_loss"] == "" and outcome(directory / "runs" / rows["wild"]["run"])["code"] == 4
    assert "0, 1 diverged" in table


def test_data_that_are_not_there_are_told_first(values: dict[str, Any], tmp_path: Path) -> None:
    file = write_study(tmp_path / "study.yaml", values)
    for override, message in (
        ("data.source=nowhere/*.json.gz", "data.source"),
        ("eval.source=nowhere/*.json.gz", "eval.source"),
        ("data.tokenizer=none.model", "cannot read the tokenizer none.model"),
        ("model.vocab_size=200", "model.vocab_size = 200 is smaller than the 300 pieces"),
    ):
        with study(file, override) as process:
            assert process.wait() in (2, 3)
            assert process.stderr.startswith("error: ") and message in process.stderr
    assert not (tmp_path / "study").exists()
