"""`eval.samples`: the same continuations under every engine, and the same losses as without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sltrain_dist import cli
from sltrain_dist.tracking.mlflow import MlflowTracker
from tests.distributed import whole_run
from tests.distributed.launch import launch_each
from tests.support.runs import final_tensors, train_here, trajectory

PROMPTS = ["bafe", "gida toxu", "mani bafe"]
SAMPLES = (f"eval.samples={json.dumps(PROMPTS)}", "eval.sample_tokens=5")
CONSTANT = "optim.schedule=constant"  # so that a run of three updates can be the beginning of one of six


def samples(run: Path) -> dict[int, list[tuple[str, str]]]:
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "one line for each evaluation"
    return {line["step"]: [(each["prompt"], each["continuation"]) for each in line["samples"]] for line in lines}


def test_samples_change_no_loss_and_are_those_of_the_command(
    tiny: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attached: list[Path] = []
    monkeypatch.setattr(MlflowTracker, "attach", lambda self, path: attached.append(path))
    run = tmp_path / "run"
    # A stop and a resume in the middle.
    assert train_here(tiny, run, *SAMPLES, CONSTANT, "train.steps=3") == 0
    assert train_here(tiny, run, *SAMPLES, CONSTANT, "tracking.mlflow=true") == 0
    whole = tmp_path / "whole"
    assert train_here(tiny, whole, CONSTANT) == 0
    assert trajectory(run) == trajectory(whole)
    assert final_tensors(run) == final_tensors(whole)
    assert attached == [run / "samples.jsonl"], "at the one evaluation with MLflow"

    found = samples(run)
    assert list(found) == [0, 3, 6]
    assert found[0] != found[6], "they follow the model"
    log = (run / "log.txt").read_text()
    for prompt, continuation in found[6]:
        assert f"step 6  {prompt!r} goes on with {continuation!r}\n" in log
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    monkeypatch.setattr("sys.argv", ["sltrain", "generate", str(run), "--json", "--max-new-tokens", "5", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(line["prompt"], line["continuation"]) for line in lines] == found[6]


@pytest.mark.slow
def test_every_engine_continues_alike(tiny: Path, tmp_path: Path) -> None:
    """On two ranks, with two prompts at a time."""
    pytest.importorskip("deepspeed")
    settings = (*SAMPLES, CONSTANT, "train.micro_batch=2")
    assert train_here(tiny, tmp_path / "one", *settings) == 0
    engines = {
        "ddp": ("parallel.engine=ddp",),
        "fsdp": ("parallel.engine=fsdp", "parallel.shard=all"),
        "zero3": ("parallel.engine=zero", "parallel.zero_stage=3", "parallel.shard=all"),
    }
    launch_each(whole_run, [(tiny, tmp_path / name, *settings, *more) for name, more in engines.items()], ranks=[2])
    assert len({continuation for _, continuation in samples(tmp_path / "one")[0]}) == 3, "they follow the prompts"
    for name in engines:
        assert samples(tmp_path / name) == samples(tmp_path / "one"), name


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (["mani", ""], "eval.samples[1] is '', which has no tokens"),
        (
            ["bafe " * 30],
            "eval.samples[0] has 151 tokens, but a prompt and its continuation must fit into data.seq_len = 24",
        ),
    ],
)
def test_prompts_that_cannot_be_continued_end_the_start(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], samples: list[str], message: str
) -> None:
    assert train_here(tiny, tmp_path / "run", f"eval.samples={json.dumps(samples)}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
