"""`sltrain plan`: the command, its files, and what it refuses."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist import cli
from sltrain_dist.config.load import load_config
from sltrain_dist.plan.planned_run import launch_command
from tests.support.paths import REPO

SMALL = str(REPO / "configs" / "llama_60m.yaml")
ONE_RANK = ["parallel.engine=ddp", "train.micro_batch=8"]
FEW_CHANGES = ["reparam.method=full", "train.global_batch=8"]
"""No other supports, paths or larger micro-batches are tried for a run that does not fit: each takes a recording."""

KEYS = {
    "peak_bytes",
    "device_bytes",
    "phases",
    "components",
    "fits",
    "margin_bytes",
    "parameters",
    "flops_per_token",
    "comm_bytes_per_update",
}


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sltrain", "plan", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert plan(monkeypatch, "--json", *arguments) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(monkeypatch, capsys, "--config", SMALL, *ONE_RANK)
    assert result.keys() >= KEYS
    assert sum(result["components"].values()) == max(result["phases"].values()) == result["peak_bytes"]
    assert result["phases"][result["peak_phase"]] == result["peak_bytes"] <= result["device_bytes"]
    assert result["phase_components"][result["peak_phase"]] == result["components"]
    assert result["fits"] is None and result["margin_bytes"] is None and "changes" not in result
    assert result["parameters"] == 43_529_832  # base + LR + SP
    assert result["comm_bytes_per_update"] == 0 and result["method"] == "recording"


def test_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The device is just large enough, or one byte too small; either is an answer, with exit code 0."""
    asked = ["--config", SMALL, *ONE_RANK, *FEW_CHANGES]
    needs = planned(monkeypatch, capsys, *asked)["device_bytes"]
    exact = planned(monkeypatch, capsys, *asked, "--device-memory", str(needs))
    assert exact["fits"] is True and exact["margin_bytes"] == 0 and "changes" not in exact
    short = planned(monkeypatch, capsys, *asked, "--device-memory", str(needs - 1))
    assert short["fits"] is False and short["margin_bytes"] == -1
    assert short["changes"] and all(change["device_bytes"] < needs for change in short["changes"])
    speeds = [change["relative_speed"] for change in short["changes"]]
    assert speeds == sorted(speeds, reverse=True)
    # What it says is so.
    for change in short["changes"][:3]:
        settings = [f"{key}={json.dumps(value)}" for key, value in change["set"].items()]
        again = planned(monkeypatch, capsys, *asked, *settings, "--device-memory", str(needs - 1))
        assert again["fits"] is True and again["device_bytes"] == change["device_bytes"]


def test_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(monkeypatch, "--config", SMALL, *ONE_RANK, "--device-memory", "RTX 4090", "--ranks", "2") == 0
    out = capsys.readouterr().out
    assert "llama_60m, sltrain r=128" in out and "2 ranks, ddp" in out
    assert "low-rank factors" in out and "◀" in out and "Peak " in out and "Fits into 25.8 GB" in out
    assert plan(monkeypatch, "--config", SMALL, *ONE_RANK, *FEW_CHANGES, "--device-memory", "1MB") == 0
    out = capsys.readouterr().out
    assert "Does NOT fit" in out and "--search looks for combinations" in out


def test_search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    varied = ["--vary", "state bits", "--vary", "train.micro_batch=8,16"]
    search = ["--config", SMALL, *ONE_RANK, "--search", *varied]
    arguments = [*search, "--device-memory", "80GB", "--save", str(tmp_path / "rows")]
    found = planned(monkeypatch, capsys, *arguments)["search"]
    assert (found["examined"], found["estimated"], found["refused"], found["fitting"]) == (6, 6, {}, 6)
    assert found["rows"][0]["relative_speed"] == max(row["relative_speed"] for row in found["rows"])
    for row in found["rows"]:
        config = load_config(row["file"])
        assert config.optim.state_bits == int(row["settings"]["state bits"])
        assert config.train.global_batch == 512
        again = planned(monkeypatch, capsys, "--config", row["file"])
        assert (again["peak_bytes"], again["parameters"]) == (row["peak_bytes"], row["parameters"])
    assert plan(monkeypatch, *search, *FEW_CHANGES, "--device-memory", "1MB") == 0
    out = capsys.readouterr().out
    assert "0 fit into 1.00 MB." in out and "The smallest takes" in out
    assert planned(monkeypatch, capsys, *search, "--rows", "1")["search"]["rows_left_out"] == len(found["rows"]) - 1


def test_settings_without_effect_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(monkeypatch, "--config", SMALL, *ONE_RANK, "parallel.zero_stage=3") == 0
    assert "note: parallel.zero_stage has no effect with parallel.engine=ddp" in capsys.readouterr().err


@pytest.mark.slow
def test_usual_search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without --vary, on two ranks: thousands of combinations, those that cannot be run counted by reason."""
    (tmp_path / "small.yaml").write_text(
        "preset: llama_60m\nmodel: {num_layers: 1}\ntrain: {global_batch: 2, micro_batch: 1}\n"
        "parallel: {engine: zero}\nreparam: {support: blocks}\n"
    )
    small = ["--config", str(tmp_path / "small.yaml"), "--ranks", "2", "--search"]
    found = planned(monkeypatch, capsys, *small)
    assert found["search"]["examined"] == 3 * 2 * 5 * 1 * 3 * 3 * 9
    assert {"optim.update", "optim.state_bits"} <= found["search"]["refused"].keys()
    assert 0 < len(found["search"]["rows"]) <= 12
    # What the command line says stays as it is.
    fixed = planned(monkeypatch, capsys, *small, "parallel={engine: ddp}", "train.micro_batch=1", "optim.state_bits=8")
    assert fixed["search"]["examined"] == 2 * 5 * 3 * 3
    assert not {"engine", "micro-batch", "state bits"} & fixed["search"]["rows"][0]["settings"].keys()


@pytest.mark.slow
def test_will_7b_fit_on_my_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The shipped file is for several GPUs; asked about one, the plan is for one, says so, and finds what fits."""
    monkeypatch.chdir(tmp_path)
    config = str(REPO / "configs" / "llama_7b.yaml")
    levers = ("state bits", "update", "train.micro_batch=1,8", "recompute")
    few = [word for lever in levers for word in ("--vary", lever)]
    asked = ["--config", config, "--device-memory", "NVIDIA GeForce RTX 4090", "--search", *few]
    result = planned(monkeypatch, capsys, *asked, "--save", "plans")
    assert result["assumed"] == {"parallel.engine": "ddp"} and result["device_memory_bytes"] == 24_564 << 20
    found = result["search"]
    assert found["refused"] == {} and found["examined"] == 3 * 2 * 2 * 5 and found["fitting"] > 10
    assert len({row["settings"]["train.micro_batch"] for row in found["rows"]}) > 1
    for row in found["rows"]:
        saved = load_config(row["file"])
        assert saved.parallel.engine == "ddp" and row["launch"] == f"sltrain train --config {row['file']}"
        assert f"# start: {row['launch']}\n" in Path(row["file"]).read_text()
        spare = result["device_memory_bytes"] - row["device_bytes"]
        assert row["within_error"] == (spare < 0.05 * row["peak_bytes"])
    monkeypatch.setattr("sltrain_dist.cli.plan._MIN_COMBINATIONS_FOR_PROGRESS", 2)
    assert plan(monkeypatch, "--config", config, "--search", "--vary", "update") == 0
    captured = capsys.readouterr()
    assert "With one rank, the plan is for parallel.engine=ddp" in captured.out
    assert "2/2 combinations examined" in captured.err.splitlines()
    # Asked for by name, the engine stays; so it does where a single device needs another.
    assert planned(monkeypatch, capsys, "--config", config, "parallel.engine=zero")["assumed"] == {}
    offloaded = tmp_path / "offload.yaml"
    offloaded.write_text("preset: llama_60m\nparallel: {engine: fsdp, cpu_offload: true}\n")
    assert planned(monkeypatch, capsys, "--config", str(offloaded))["assumed"] == {}
    assert planned(monkeypatch, capsys, "--config", config, "--ranks", "2")["assumed"] == {}


def test_rows_within_the_error_of_the_limit_are_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    search = ["--config", SMALL, *ONE_RANK, "--search", "--vary", "state bits"]
    rows = planned(monkeypatch, capsys, *search)["search"]["rows"]
    needs = max(row["device_bytes"] for row in rows)
    memory = ["--device-memory", f"{needs}B"]
    marked = [row["within_error"] for row in planned(monkeypatch, capsys, *search, *memory)["search"]["rows"]]
    assert marked == [row["device_bytes"] == needs for row in rows] and True in marked
    capsys.readouterr()
    assert plan(monkeypatch, *search, *memory, "--html", str(tmp_path / "x.html")) == 0
    out = capsys.readouterr().out
    assert "~ marks rows that have less to spare than the estimate's error" in out and "to spare" in out
    assert re.search(r"~[\d.]+ [kMG]?B", out) and "~ marks rows" in (tmp_path / "x.html").read_text()
    smaller = ["--device-memory", f"{min(row['device_bytes'] for row in rows) - 1}B"]
    assert plan(monkeypatch, *search, *smaller) == 0
    assert "It misses by less than the estimate's error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, "sltrain train --config 'my plans/a.yaml'"),
        (4, "torchrun --standalone --nproc-per-node 4 -m sltrain_dist train --config 'my plans/a.yaml'"),
        (
            16,
            "torchrun --nnodes 2 --nproc-per-node 8 --node-rank I --master-addr HOST0 --master-port 29500 "
            "-m sltrain_dist train --config 'my plans/a.yaml'",
        ),
    ],
)
def test_launch_commands(ranks: int, expected: str) -> None:
    assert launch_command("my plans/a.yaml", ranks) == expected


@pytest.mark.parametrize("width", [36, 60])
def test_narrow_terminals_cut_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, width: int
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    search = ["--search", "--vary", "state bits", "--vary", "recompute", "--device-memory", "RTX 4090"]
    assert plan(monkeypatch, "--config", SMALL, *ONE_RANK, *search) == 0
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "…" not in out and max(map(len, out.splitlines())) <= width
    assert re.search(r"  forward ◀ [\d.]+  ", out) and re.search(r"to spare [\d.]+ GB", out)
    assert plan(monkeypatch, "--config", SMALL, "--accounting", "paper") == 0
    assert "…" not in capsys.readouterr().out
    files = tmp_path / ("long-" * 20)
    assert plan(monkeypatch, "--config", SMALL, *ONE_RANK, *search, "--save", str(files)) == 0
    assert f"file{files}/plan-01.yaml" in re.sub(r"\s", "", capsys.readouterr().out)


@pytest.mark.slow
def test_replay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a very small model, alone and for the rows of a search; it has no context of its own, but the device has."""
    shape = ["model.hidden_size=64", "model.intermediate_size=96", "model.num_layers=1", "model.num_heads=2"]
    batch = [
        "train.global_batch=2",
        "train.micro_batch=2",
        "data.seq_len=32",
        "reparam.rank=16",
        "model.vocab_size=256",
    ]
    tiny = ["--config", SMALL, "parallel.engine=ddp", *shape, *batch]
    closed = planned(monkeypatch, capsys, *tiny)
    replayed = planned(monkeypatch, capsys, *tiny, "--replay")
    assert replayed["method"] == "replay" and closed["method"] == "recording"
    assert replayed["peak_bytes"] == pytest.approx(closed["peak_bytes"], rel=0.05)
    reserved = closed["device_bytes"] - closed["peak_bytes"]
    assert replayed["device_bytes"] - replayed["peak_bytes"] == reserved > 10**8
    searched = planned(monkeypatch, capsys, *tiny, "--search", "--vary", "optim.state_bits=16", "--replay")
    assert searched["method"] == "recording"
    assert searched["search"]["rows"][0]["replayed_bytes"] == replayed["peak_bytes"]


def test_accounting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for method, total in (("full", 0.35), ("galore", 0.28), ("sltrain", 0.26)):
        arguments = ["--config", SMALL, f"reparam.method={method}", "--accounting", "paper"]
        result = planned(monkeypatch, capsys, *arguments)
        assert result["total_gb"] == total and result["method"] == method
        assert result["methods"][method]["total_gb"] == total and len(result["methods"]) == 5
    assert (result["parameter_gb"], result["optimizer_gb"]) == (0.09, 0.17)
    assert plan(monkeypatch, "--config", SMALL, "--accounting", "paper") == 0
    assert "sltrain ◀" in capsys.readouterr().out


def test_reference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["reparam.method=galore", "optim.state_bits=8", "optim.update=per_layer"]
    large = ["--config", str(REPO / "configs" / "llama_7b.yaml"), "parallel.engine=ddp", "train.micro_batch=1"]
    result = planned(monkeypatch, capsys, *large, *settings, "--implementation", "reference")
    assert result["peak_bytes"] / 1e9 == pytest.approx(22, rel=0.1)
    assert result["method"] == "reference emulation" and "states.projectors" in result["components"]


def test_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = {kind: tmp_path / f"plan.{kind}" for kind in ("html", "png", "svg", "pdf")}
    arguments = ["--config", SMALL, *ONE_RANK, "--device-memory", "1GB"]
    assert plan(monkeypatch, *arguments, "--html", str(files["html"]), "--plot", str(files["png"])) == 0
    for kind in ("svg", "pdf"):
        assert plan(monkeypatch, *arguments, "--plot", str(files[kind])) == 0
    assert files["html"].read_text().startswith("<!doctype html>")
    assert files["png"].read_bytes().startswith(b"\x89PNG") and files["pdf"].read_bytes().startswith(b"%PDF")
    assert "<svg" in files["svg"].read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "3"], "is not a multiple of train.micro_batch"),
        (["parallel.engine=fsdp", "parallel.replicas=3", "--ranks", "4"], "does not divide 4 ranks into groups"),
        (["--device-memory", "RTX 4091"], "did you mean 'RTX 4090'?"),
        (["optim.state_bit=8"], "did you mean optim.state_bits?"),
        (["parallel.engine=zero", "optim.update=per_layer"], "set parallel.engine=fsdp or ddp"),
        (["parallel.engine=zero", "--replay"], "zero"),
        (["reparam.method=relora"], "never merges its factors with reparam.restart_every = 0"),
        (["--save", "rows"], "--save needs --search"),
        (["--vary", "engine"], "--vary needs --search"),
        (["--search", "--vary", "engines"], "--vary 'engines' is neither"),
        (["--search", "--vary", "train.micro_batch=7,9"], "none of 2 combinations can be run"),
        (["--accounting", "paper", "reparam.method=cola"], "the paper's table has full, lowrank, relora, galore"),
        (["--accounting", "paper", "--search", "--ranks", "2"], "leave out --search, --ranks"),
        (["--implementation", "reference", "--ranks", "2"], "leave out --ranks 2"),
        (["--implementation", "reference", "optim.state_bits=4"], "optim.state_bits: the published code has no"),
        (["--plot", "plan.jpeg"], "the suffix must be one of .png, .svg, .pdf"),
        (["--html", "none/plan.html"], "--html: cannot write none/plan.html"),
        (["--plot", "none/plan.png"], "--plot: cannot write none/plan.png"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan(monkeypatch, "--config", SMALL, *ONE_RANK, *arguments) == 2
    captured = capsys.readouterr()
    (line, *_) = (line for line in captured.err.splitlines() if not line.startswith("note: "))
    assert line.startswith("error: ") and expected in captured.err
    assert captured.out == "" and list(tmp_path.iterdir()) == []


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(monkeypatch, "--config", SMALL, *ONE_RANK, "--html", "/dev/full") == 6
    assert capsys.readouterr().err.endswith("error: --html: cannot write /dev/full: No space left on device\n")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "sltrain_dist", "plan", "--config", SMALL]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 6
    assert result.stderr.endswith("error: the output cannot be written: No space left on device\n")


def test_an_unfinished_file_is_deleted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def write_half(path: Path, content: bytes) -> None:
        path.write_text(content.decode()[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    assert plan(monkeypatch, "--config", SMALL, *ONE_RANK, "--html", str(tmp_path / "x.html")) == 6
    assert "--html: cannot write" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", ["0", "-2", "2.5", "two"])
def test_impossible_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: str) -> None:
    assert plan(monkeypatch, "--config", SMALL, "--ranks", ranks) == 2
    assert "--ranks" in capsys.readouterr().err


def test_a_typo_in_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: llama_60m\nreparam: {rnak: 64}\n")
    assert plan(monkeypatch, "--config", str(path)) == 2
    assert "did you mean reparam.rank?" in capsys.readouterr().err


def test_no_torch_and_nothing_heavy() -> None:
    script = (
        "import sys\nfrom sltrain_dist import cli\n"
        f"sys.argv = ['sltrain', 'plan', '--config', {SMALL!r}, 'parallel.engine=ddp', '--search', '--vary=update']\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'datasets', 'mlflow', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "combinations" in result.stdout
