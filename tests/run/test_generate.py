"""`sltrain generate` on a run that has ended."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sltrain_dist import cli

PROMPTS = ["bafe", "gida toxu bafe", "mani"]
Generate = Callable[..., int]


@pytest.fixture
def generate(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """Runs the command in this process; returns its exit code."""

    def run(*arguments: str, checkpoint: Path = finished) -> int:
        monkeypatch.setattr(sys, "argv", ["sltrain", "generate", str(checkpoint), *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0)

    return run


def options(prompts: list[str]) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def test_forms_batches_and_outputs_agree(
    generate: Generate, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(*arguments: str) -> str:
        assert generate("--max-new-tokens", "8", *arguments) == 0
        return capsys.readouterr().out

    lines = [json.loads(line) for line in output("--json", *options(PROMPTS)).splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert all(line["tokens"] == 8 and line["stop"] == "max_new_tokens" and line["continuation"] for line in lines)

    text = output(*options(PROMPTS))
    assert text == "\n".join(line["prompt"] + line["continuation"] + "\n" for line in lines)
    for other in (["--stream"], ["--merged"], ["--batch-size", "1"], ["--device", "cpu", "--dtype", "fp32"]):
        assert output(*other, *options(PROMPTS)) == text, other

    (tmp_path / "prompts.txt").write_text("\r\n".join(PROMPTS) + "\n\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each, "id": 1}) + "\n" for each in PROMPTS))
    (tmp_path / "strings.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PROMPTS))
    for name in ("prompts.txt", "prompts.jsonl", "strings.jsonl"):
        assert output("--prompts-file", str(tmp_path / name)) == text, name

    sampled = ("--temperature", "2", "--top-p", "0.95", *options(PROMPTS))
    first = output("--seed", "1", *sampled)
    assert first != text
    assert output("--seed", "1", "--stream", *sampled) == output("--seed", "1", "--batch-size", "2", *sampled) == first
    assert output("--seed", "2", *sampled) != first
    earlier = finished / "checkpoints" / "step_00000002"
    assert generate("--prompt", "bafe", checkpoint=earlier) == 0


def test_the_context_ends_a_continuation(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--json", "--prompt", "bafe gida") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["stop"] == "context" and line["prompt_tokens"] + line["tokens"] == 24
    assert generate("--prompt", "bafe gida") == 0
    note = f"note: prompt 1 is continued by {line['tokens']} tokens only, because the model was trained with"
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "there is nothing to continue; give --prompt TEXT"),
        (["--prompt", ""], 2, "prompt 1 is '', which has no tokens"),
        (["--prompt", "mani", "--prompt", "bafe " * 30], 2, "prompt 2 has 151 tokens, but a prompt and its"),
        (["--prompt", "mani", "--top-p", "0.5"], 2, "--top-p has no effect with --temperature 0"),
        (["--prompt", "mani", "--top-p", "1.5"], 2, "--top-p 1.5 must be above 0 and at most 1"),
        (["--prompt", "mani", "--temperature", "nan"], 2, "--temperature nan must be a number"),
        (["--prompt", "mani", "--stream", "--json"], 2, "choose one of them"),
        (["--prompts-file", "{tmp}/none"], 3, "none cannot be read: No such file"),
        (["--prompts-file", "{tmp}/wrong.jsonl"], 3, "line 3 of {tmp}/wrong.jsonl is neither a string nor an object"),
        (["--prompts-file", "{tmp}/text.jsonl"], 3, "line 1 of {tmp}/text.jsonl is not JSON"),
        (["--prompts-file", "{tmp}/latin.txt"], 3, "latin.txt is not UTF-8"),
    ],
)
def test_mistakes(
    generate: Generate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "wrong.jsonl").write_text('"bafe"\n\n{"text": "bafe"}\n')
    (tmp_path / "text.jsonl").write_text("bafe\n")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    assert generate(*(each.format(tmp=tmp_path) for each in arguments)) == code
    captured = capsys.readouterr()
    assert message.format(tmp=tmp_path) in captured.err and captured.out == ""


def test_not_a_checkpoint(generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "bafe", checkpoint=tmp_path) == 5
    assert f"{tmp_path} is not a checkpoint" in capsys.readouterr().err
