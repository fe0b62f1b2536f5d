from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from backports import zstd

from sltrain_dist import cli
from sltrain_dist.errors import CheckpointError
from tests.support.paths import REPO

PRETRAIN = "launch/pretrain.py"
TRAIN, PLAN = (["sltrain_dist/cli/__main__.py", command] for command in ("train", "plan"))
SENTENCES = "The {0} fox is quick today. A {0} dog sleeps in the sun. They meet at the {0} river.\n"


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command in this process: fast, and with the very function that the entry point calls."""
    monkeypatch.setattr(sys, "argv", ["sltrain", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    names = [a + b for a in ("red", "blue", "small", "old", "grey") for b in ("ish", "er", "est", "ly")]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(SENTENCES.format(name))
    return str(tmp_path / "*.txt")


@pytest.mark.parametrize("command", [command.name for command in cli.app.registered_commands])
def test_help_of_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert _run(monkeypatch, command, "--help") == 0
    assert "Usage: " in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom sltrain_dist import cli\nsys.argv = ['sltrain', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'numpy', 'sentencepiece', 'datasets', 'mlflow', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "prepare-text" in result.stdout and "train-tokenizer" in result.stdout


def _without_torch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which must not have imported torch when it ends."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end:\n    code = end.code\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (TRAIN, ["--config", "nofile.yaml"], "nofile.yaml: cannot read the configuration"),
        (TRAIN, ["--config", "{config}", "train.stepz=1"], "did you mean train.steps?"),
        (
            [PRETRAIN],
            ["--config", "{config}", "reparam.method=relora"],
            "set parallel.engine=ddp, or use another",
        ),
        ([PRETRAIN], ["--config", "{config}", "run_dir=$NOT_SET/x"], "the environment variable NOT_SET is not set"),
        (PLAN, ["--config", "{config}", "train.stepz=1"], "did you mean train.steps?"),
    ],
)
def test_a_wrong_configuration_is_told_without_torch(command: list[str], arguments: list[str], message: str) -> None:
    script = str(REPO / command[0])
    config = REPO / "configs" / "llama_60m.yaml"
    result = _without_torch([script, *command[1:], *(a.format(config=config) for a in arguments)])
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


def test_train_says_where_a_run_will_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """DeepSpeed's launcher puts its own option before the command."""
    (tmp_path / "run.yaml").write_text(f"run_dir: {tmp_path}/here\ntrain: {{steps: 1}}\n")
    arguments = ["--local_rank=0", "train", "--config", str(tmp_path / "run.yaml"), "--print-run-dir"]
    assert _run(monkeypatch, *arguments, "train.dry_run=true") == 0
    assert capsys.readouterr().out == f"{tmp_path}/here/dry_run\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_as_a_module(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "sltrain_dist", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.startswith("Usage: sltrain "), result.stderr


def test_the_module_that_starts_runs_says_how_to_start_one() -> None:
    command = [sys.executable, "-m", "sltrain_dist.train.run", "--config", "x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "use `sltrain train --config FILE`" in result.stderr


def test_help_is_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert _run(monkeypatch, "prepare-text", "--help") == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--validation-fraction", "--max-document-bytes", "--min-sentences"))
    assert "…" not in out


def test_paths_of_options_are_expanded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], texts: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    assert _run(monkeypatch, "prepare-text", "-i", "$HERE/*.txt", "-o", "$HERE/out", "--shards", "1") == 0
    assert (tmp_path / "out" / "manifest.json").is_file()
    capsys.readouterr()
    for arguments, option in (
        (["prepare-text", "-i", texts, "-o", "$NOPE/x"], "--output '$NOPE/x': the environment variable NOPE"),
        (["prepare-text", "-i", "", "-o", "x"], "--input '': is empty"),
        (["train-tokenizer", "-i", texts, "-o", ""], "--output '': is empty"),
        (["verify", "~nobody-of-this-name"], "PATH '~nobody-of-this-name': there is no home directory"),
        (["export", "", "-o", "x"], "CHECKPOINT '': is empty"),
        (["train", "--config", "$NOPE/x"], "--config '$NOPE/x': the environment variable NOPE"),
        (["plan", "--config", "x", "--html", ""], "--html '': is empty"),
    ):
        assert _run(monkeypatch, *arguments) == 2
        assert f"error: {option}" in capsys.readouterr().err


def test_out_of_memory_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sltrain_dist.data.prepare.make_corpus.prepare_files", lambda *args, **kwargs: bytearray(2**62))
    assert _run(monkeypatch, "prepare-text", "-o", str(tmp_path / "x"), "-i", "y") == 2
    assert capsys.readouterr().err == "error: this machine is out of memory (MemoryError)\n"


def test_prepare_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], texts: str, tmp_path: Path
) -> None:
    arguments = ("prepare-text", "-i", texts, "-o", str(tmp_path / "out"), "--shards", "2", "--name", "foxes")
    assert _run(monkeypatch, *arguments) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [
        "foxes-train.00000-of-00002.json.gz",
        "foxes-train.00001-of-00002.json.gz",
        "foxes-validation.00000-of-00001.json.gz",
    ]
    captured = capsys.readouterr()
    assert manifest["fingerprint"] in captured.out
    assert f"{manifest['splits']['train']['documents']} (" in captured.out
    assert "20/20" in captured.err
    assert _run(monkeypatch, *arguments) == 2
    assert (
        capsys.readouterr().err == f"error: --output {tmp_path / 'out'} already exists; choose another directory "
        "or remove it\n"
    )


def test_train_tokenizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], texts: str, tmp_path: Path
) -> None:
    output = tmp_path / "t.model"
    assert _run(monkeypatch, "train-tokenizer", "-i", texts, "-o", str(output), "--vocab-size", "300") == 0
    from sltrain_dist.data.tokenizer import Tokenizer

    out = capsys.readouterr().out
    assert Tokenizer(output).vocab_size == 300
    assert "300 pieces" in out and "bytes per token" in out and Tokenizer(output).fingerprint in out


def test_every_command_reads_zstd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also in UTF-16 and in Latin-1, with the encoding given."""
    model, latin = str(tmp_path / "t.model"), str(tmp_path / "latin.txt")
    rows = [json.dumps({"text": SENTENCES.format(f"{a}{b}")}) for a in ("red", "blue", "old") for b in range(9)]
    shard = tmp_path / "x.jsonl.zst"
    shard.write_bytes(zstd.compress("\n".join(rows).encode("utf-16")))
    Path(latin).write_bytes((SENTENCES.format("vieux café") * 3).encode("latin-1"))
    arguments = ("train-tokenizer", "-o", model, "--vocab-size", "300", "-i")
    assert _run(monkeypatch, *arguments, str(shard)) == 0
    assert _run(monkeypatch, *arguments, latin) == 3
    assert "latin.txt is not UTF-8 text" in capsys.readouterr().err
    assert _run(monkeypatch, *arguments, latin, "-i", latin, "--encoding", "nonsense") == 2
    assert _run(monkeypatch, "prepare-text", "-i", str(shard), "-o", str(tmp_path / "corpus")) == 0
    assert _run(monkeypatch, "prepare-text", "-i", latin, "-o", str(tmp_path / "x"), "--no-clean") == 3
    tokens = ("prepare-tokens", "-i", str(shard), "-o", str(tmp_path / "tokens"), "--tokenizer", model)
    assert _run(monkeypatch, *tokens, "--encoding", "latin-1") == 2
    assert _run(monkeypatch, *tokens) == 0
    assert "documents  27" in capsys.readouterr().out


def test_prepare_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], texts: str, tmp_path: Path
) -> None:
    """In two processes; a second run finds all done; a damaged shard is made again."""
    model, output = str(tmp_path / "t.model"), tmp_path / "tokens"
    assert _run(monkeypatch, "train-tokenizer", "-i", texts, "-o", model, "--vocab-size", "300") == 0
    for shard in range(3):
        lines = [json.dumps({"text": f"Foxes of shard {shard} and line {line}."}) for line in range(20)]
        (tmp_path / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["prepare-tokens", "--tokenizer", model, "-i", str(tmp_path / "part-*.jsonl"), "-o", str(output)]
    capsys.readouterr()
    assert _run(monkeypatch, *arguments, "--processes", "2") == 0
    captured = capsys.readouterr()
    assert "60" in captured.out and "uint16" in captured.out and "3/3" in captured.err
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("0*")}
    before = (output / "00001.tokens").read_bytes()
    assert len(times) == 6 and _run(monkeypatch, *arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("0*")} == times
    (output / "00001.tokens").write_bytes(before[:-2] + b"\0\0")
    capsys.readouterr()
    assert _run(monkeypatch, "verify", str(output)) == 3 and "00001.tokens" in capsys.readouterr().err
    assert _run(monkeypatch, *arguments) == 0 and (output / "00001.tokens").read_bytes() == before
    assert _run(monkeypatch, *arguments, "--text-field", "body") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prepare-tokens", "-o", "out", "--tokenizer", "none.model"], 2, "give --input"),
        (["prepare-tokens", "-o", "out", "-i", "{broken}", "--tokenizer", "none.model"], 3, "none.model"),
        (["prepare-tokens", "-o", "out", "-i", "none/*.jsonl", "--tokenizer", "t.model"], 3, "check --input"),
        (["prepare-text", "-o", "out"], 2, "either --input"),
        (["prepare-text", "-o", "out", "-i", "{texts}", "--embedded"], 2, "not both"),
        (["prepare-text", "-o", "out", "--embedded", "--no-clean"], 2, "its own rules"),
        (["prepare-text", "-o", "out", "-i", "none/*.txt"], 3, "no file matches"),
        (["prepare-text", "-o", "out", "-i", "{broken}"], 3, "line 1: not JSON"),
        (["prepare-text", "-o", "out", "-i", "{texts}", "--min-sentences", "9"], 3, "too few sentences: 20"),
        (["train-tokenizer", "-o", "t.model"], 2, "give --input"),
        (["train-tokenizer", "-o", "t.model", "-i", "{texts}"], 2, "32000 is too large"),
        (["train-tokenizer", "-o", "t.model", "-i", "{broken}"], 3, "not JSON"),
    ],
)
def test_mistakes_are_one_message_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    texts: str,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "broken.jsonl").write_text("not json\n")
    monkeypatch.chdir(tmp_path)
    filled = [a.format(texts=texts, broken=tmp_path / "broken.jsonl") for a in arguments]
    assert _run(monkeypatch, *filled) == code
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert message in line
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "t.model").exists()


@pytest.mark.parametrize(
    "arguments", [["prepare-dat"], ["prepare-text", "-o", "x", "--shards", "0"], ["train-tokenizer"]]
)
def test_usage_errors_are_code_2(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    assert _run(monkeypatch, *arguments) == 2


def test_every_typed_error_has_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise CheckpointError("the checkpoint is damaged")

    monkeypatch.setattr("sltrain_dist.data.prepare.make_corpus.prepare_files", fail)
    assert _run(monkeypatch, "prepare-text", "-o", str(tmp_path / "x"), "-i", "y") == 5
    assert capsys.readouterr().err == "error: the checkpoint is damaged\n"


@pytest.mark.parametrize(
    ("option", "command"),
    [([], "prepare-text"), (["--tokenizer", "x"], "prepare-tokens"), (["--tokenizer=x"], "prepare-tokens")],
)
def test_the_former_name_of_two_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: list[str], command: str
) -> None:
    assert _run(monkeypatch, "prepare-data", *option, "-o", "out") == 2
    first, error = capsys.readouterr().err.splitlines()
    assert first == f"note: `sltrain prepare-data` is deprecated; use `sltrain {command}`" and error.startswith(
        "error: give "
    )
    assert _run(monkeypatch, "prepare-data", *option, "--no-such-option") == 2
    assert "No such option: --no-such-option" in capsys.readouterr().err


def test_the_former_name_does_the_same(monkeypatch: pytest.MonkeyPatch, texts: str, tmp_path: Path) -> None:
    for command in ("prepare-data", "prepare-text"):
        assert _run(monkeypatch, command, "-i", texts, "-o", str(tmp_path / command), "--shards=2", "--no-dedup") == 0
    names = sorted(path.name for path in (tmp_path / "prepare-text").iterdir())
    assert names and all(
        (tmp_path / "prepare-data" / name).read_bytes() == (tmp_path / "prepare-text" / name).read_bytes()
        for name in names
    )
