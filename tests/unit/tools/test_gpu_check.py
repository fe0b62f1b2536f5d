"""tools/gpu_check.py and its parts: a rehearsal on the CPU, what is written, and mistakes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.config.load import build_config
from sltrain_dist.numerics.splitmix import key64
from tests.support.paths import REPO
from tests.support.ranks import SINGLE
from tests.support.runs import words, write_shard

sys.path.insert(0, str(REPO / "tools"))

import gpu_check
import gpu_layer
import gpu_planner
import gpu_quality
import gpu_runs
from gpu_headlines import headlines, read
from gpu_sets import SETS, nested, rows
from timed_parts import Job, Part

LEFT_OUT = {"7b", "130m"}
"""Parts that run the same tool as 1b, with other sets of configurations."""
REHEARSED = [part for part in gpu_check.PARTS if part not in LEFT_OUT]


def rehearse(directory: Path) -> Path:
    """Runs parts with tiny models on the CPU, and returns the directory of their results."""
    text, out = directory / "text.json.gz", directory / "out"
    write_shard(text, [words(key64(number, "rehearsal"), 300) for number in range(300)])
    command = ["bash", str(REPO / "tools/gpu_check.sh"), "--out", str(out), "--device", "cpu", "--rehearse"]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(
        [*command, "--text", str(text), "--minutes", "30", "--parts", *REHEARSED],
        env=environment, cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = "".join(f"{log.name}:\n{log.read_text()[-2000:]}\n" for log in out.glob("*.log"))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    return out


def runs(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(out.glob("runs-*.jsonl")) for row in read(file)]


def check_every_part_is_done_and_wrote_its_results(rehearsal: Path) -> None:
    parts = json.loads((rehearsal / "summary.json").read_text())["parts"]
    assert [part["part"] for part in parts] == ["environment", *REHEARSED]
    for part in parts:
        assert part["status"] == "done" and part["seconds"] <= part["limit_s"]
        assert all(job["lines"] > 0 and job["exit_status"] == 0 for job in part["jobs"]), part
        assert part["headlines"]
    text = (rehearsal / "summary.txt").read_text()
    assert text.count(": done after ") == len(parts)
    assert "validation loss after 8 updates: full" in text


def check_tests_are_collected(rehearsal: Path) -> None:
    outcomes = [row for file in rehearsal.glob("tests-*.jsonl") for row in read(file)]
    assert len(outcomes) >= 80
    if not torch.cuda.is_available():
        assert {row["outcome"] for row in outcomes} == {"skipped"}


def check_engines_have_the_same_losses(rehearsal: Path) -> None:
    for dtype in ("bf16", "mixed"):
        found = [row for row in read(rehearsal / "runs-engines.jsonl") if row["values"]["train.dtype"] == dtype]
        stages = [row["values"].get("parallel.zero_stage") for row in found]
        assert stages == [None, None, 1, 2, 3]
        for row in found:
            assert row["losses"] == pytest.approx(found[0]["losses"], rel=2e-3), row["values"]
            assert row["losses"][1] < row["losses"][0] - 0.1


def check_the_planner_is_right(rehearsal: Path) -> None:
    for row in runs(rehearsal):
        limit = 0.1 if row["values"].get("parallel.zero_stage") or row["set"] == "zero" else 1e-3
        assert abs(row["error"]) < limit, row
        assert row["tokens_per_s"] > 0 and row["mfu"] is None
    sets = {row["set"]: row for row in read(rehearsal / "planner.jsonl")}
    assert set(sets) == set(SETS) - LEFT_OUT
    assert all(row["failed"] == 0 and row["rows"] > 0 for row in sets.values())
    assert abs(sets["ddp"]["error_eager"]["max"]) < 1e-3
    (drawn,) = read(rehearsal / "planner-random.jsonl")
    assert abs(drawn["error"]) < 0.05


def check_layers_have_ratios_and_kernels(rehearsal: Path) -> None:
    device, *groups, layer = read(rehearsal / "layer.jsonl")
    assert all(rate > 0 for rate in device["rates"].values()) and len(groups) == 4
    for row in (row for group in groups for row in group["methods"]):
        assert row["ratio"] > 0 and row["kernels_s"] > 0 and row["kernels"]
        assert sum(kernel["s"] for kernel in row["predicted"]) == pytest.approx(row["predicted_s"] or 0)
        assert (row["predicted_s"] is None) is (row["method"] == "published")
    for method in layer["layer"]:
        each = [row for group in groups for row in group["methods"] if row["method"] == method["method"]]
        assert method["seconds"] == pytest.approx(sum(row["seconds"] for row in each))
        assert method["seconds_ratio"] > 0


def check_methods_are_compared_after_equal_tokens(rehearsal: Path) -> None:
    settings, *lines, compared = read(rehearsal / "quality.jsonl")
    assert "preset=llama_60m" in settings["settings"]
    assert compared["compared_at_step"] == 8 and set(compared["eval_loss"]) == set(gpu_quality.METHODS)
    for method, loss in compared["eval_loss"].items():
        losses = {line["step"]: line["eval_loss"] for line in lines if line["method"] == method}
        assert loss == losses[8] < losses[0] - 0.5
    assert len({line["eval_tokens"] for line in lines}) == 1


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    """One test, because a rehearsal takes a while, and tests that share one could run in two processes."""
    rehearsal = rehearse(tmp_path)
    check_every_part_is_done_and_wrote_its_results(rehearsal)
    check_tests_are_collected(rehearsal)
    check_engines_have_the_same_losses(rehearsal)
    check_the_planner_is_right(rehearsal)
    check_layers_have_ratios_and_kernels(rehearsal)
    check_methods_are_compared_after_equal_tokens(rehearsal)


@pytest.mark.parametrize("name", SETS)
def test_every_configuration_is_valid(name: str) -> None:
    for rehearse in (False, True):
        for values, whole in rows(name, rehearse=rehearse):
            config = build_config(nested(whole))
            if rehearse:
                assert config.model.hidden_size == 64 and config.train.micro_batch == 2
            else:
                kept = {**nested(whole)["train"], **nested(values).get("train", {})}
                assert config.train.micro_batch == kept["micro_batch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "the CPU is only for rehearsals; add --rehearse"),
        (["--minutes", "2"], "--minutes must be at least 3"),
        (["--minutes", "nan"], "--minutes must be at least 3"),
        (["--text", "none.json.gz"], "none.json.gz: there is no such file"),
        (["--parts", "layers"], "invalid choice: 'layers'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def check(parts: list[Part], out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs a check with other parts; the handler of SIGTERM stays as it is."""
    monkeypatch.setattr(gpu_check, "make_parts", lambda args: parts)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *unused: None)
    return gpu_check.main(["--out", str(out), "--device", "cpu", "--rehearse", *arguments])


@pytest.mark.slow
def test_a_part_over_its_limit_is_cut_off_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"failed": "no memory", "method": "full"})
    script = f"echo '{line}' >>$0; printf half >>$0; echo training; sleep 600"
    parts = [
        Part("environment", 1, 1, (Job("environment", ("true",)),)),
        Part("quality", 1e-9, 5, (Job("quality", ("bash", "-c", script, "FILE")),)),
        Part("planner", 1, 1e6, ()),
        Part("layer", 1, 1, (), skipped="for no reason"),
    ]
    assert check(parts, tmp_path, monkeypatch) == 1
    found = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [part["status"] for part in found] == ["done", "cut off", "not run", "skipped"]
    assert found[1]["jobs"][0]["lines"] == 1 and found[1]["headlines"] == ["failed: full: no memory"]
    assert read(tmp_path / "quality.jsonl") == [{"failed": "no memory", "method": "full"}]
    text = (tmp_path / "summary.txt").read_text()
    assert "planner: not run: less than its 1000000 s were left" in text
    assert "    quality.jsonl: cut off: training\n    failed: full: no memory\n" in text
    assert check([parts[0], parts[2], parts[3]], tmp_path, monkeypatch) == 0


def test_without_a_device_nothing_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        Part("environment", 1, 1, (Job("environment", ("bash", "-c", "echo no torch; exit 1")),)),
        Part("layer", 1, 1, (Job("layer", ("true",)),)),
    ]
    assert check(parts, tmp_path, monkeypatch) == 1
    assert [part["part"] for part in json.loads((tmp_path / "summary.json").read_text())["parts"]] == ["environment"]
    assert "environment.jsonl: exit status 1: no torch" in (tmp_path / "summary.txt").read_text()


def test_only_the_named_parts_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = gpu_check.parse(["--out", str(tmp_path), "--rehearse", "--device", "cpu"])
    names = [part.name for part in gpu_check.make_parts(args)]
    assert names == ["environment", *gpu_check.PARTS]
    parts = [Part(name, 1, 1, (Job(name, ("true",)),)) for name in names]
    assert check(parts, tmp_path, monkeypatch, "--parts", "planner", "layer") == 0
    found = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [part["part"] for part in found] == ["environment", "layer", "planner"]


def test_measurements_use_other_sizes_than_rehearsals(tmp_path: Path) -> None:
    args = gpu_check.parse(["--out", str(tmp_path)])
    commands = {job.name: job.command for part in gpu_check.make_parts(args) for job in part.jobs}
    assert not [name for name, command in commands.items() if {"--rehearse", "--every", "cpu"} & set(command)]
    assert "--cuda" in commands["planner-random"] and "--beside" in commands["runs-ddp"]
    assert "--beside" not in commands["runs-1b"]
    (skipped,) = [part for part in gpu_check.make_parts(args) if part.skipped]
    assert skipped.name == "quality" and skipped.skipped == "no --text was given"


GPU_ROW: dict[str, Any] = {
    "set": "1b", "number": 0, "alone": True, "values": {"preset": "llama_1b", "reparam.method": "full"},
    "tokens_per_s": 20_000.0, "mfu": 0.25, "before_bytes": 67_000_000, "allocated_bytes": 20_000_000_000,
    "reserved_bytes": 21_000_000_000, "device_used_bytes": 21_800_000_000, "peak_bytes": 19_933_000_000,
    "error": -0.005,
}  # fmt: skip


def test_memory_beyond_tensors_is_that_of_rows_alone_on_the_gpu(tmp_path: Path) -> None:
    beside = {**GPU_ROW, "alone": False, "device_used_bytes": 10**12, "error": 0.01}
    compiled = {**GPU_ROW, "values": {"reparam.support": "blocks", "train.compile": True}, "error": 0.2}
    failed = {"set": "1b", "number": 3, "alone": True, "values": {"a.b": 1}, "failed": "OutOfMemoryError: no\nmore"}
    found = gpu_planner.compare("1b", [GPU_ROW, beside, compiled, failed])
    assert (found["rows"], found["failed"]) == (4, 1)
    assert found["error_eager"] == {"min": -0.005, "median": 0.0025, "max": 0.01}
    assert found["error_compiled"]["max"] == 0.2
    assert found["context_bytes"]["max"] == 800_000_000 and found["workspace_bytes"]["median"] == 67_000_000
    assert found["fragmentation"]["median"] == pytest.approx(0.05)

    faster = {**GPU_ROW, "values": {"reparam.support": "blocks"}, "tokens_per_s": 30_000.0}
    lines = [json.dumps(row) + "\n" for row in (GPU_ROW, faster, compiled, failed)]
    (tmp_path / "runs-1b.jsonl").write_text("".join(lines))
    (tmp_path / "planner.jsonl").write_text(json.dumps(found) + "\n")
    assert headlines("1b", tmp_path) == [
        "method=full: 20000 tokens/s, 1.00 of full rank, MFU 25.0%, 19.93 GB, predicted -0.5%",
        "support=blocks: 30000 tokens/s, 1.50 of full rank, MFU 25.0%, 19.93 GB, predicted -0.5%",
        "support=blocks, compile=True: 20000 tokens/s, MFU 25.0%, 19.93 GB, predicted +20.0%",
        "failed: 1b 3 (b=1): OutOfMemoryError: no",
    ]
    assert "1b: context 800 MB (assumed 807)" in headlines("planner", tmp_path)
    assert headlines("quality", tmp_path) == []


def test_a_row_that_fails_is_written_and_the_others_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Any, *unused: Any) -> dict[str, Any]:
        if config.train.dtype == "mixed":
            raise RuntimeError("no kernel")
        return {"losses": [2.0, 1.0], "tokens_per_s": 1.0, "peak_bytes": 1, "error": 0.0}

    monkeypatch.setattr(gpu_runs, "run", run)
    monkeypatch.setattr(gpu_runs.environment, "start", lambda *unused, **need: SINGLE)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    out = tmp_path / "rows.jsonl"
    arguments = ["gpu_runs.py", "--set", "engines", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_runs.main() == 1
    found = read(out)
    assert [row.get("failed") for row in found] == [None] * 5 + ["RuntimeError: no kernel"] * 5
    assert "in run" in found[-1]["traceback"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--every", "4", "--only", "0", "4"])
    assert gpu_runs.main() == 0 and [row["number"] for row in read(out)[10:]] == [0, 4]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "H200"),  # unknown to the cost model
    ],
)
def test_the_roofline_of_this_gpu(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert gpu_layer.roofline_device(torch.device("cuda")).name == device


def test_losses_are_compared_after_the_last_update_that_all_have_reached() -> None:
    def made(losses: dict[int, float]) -> Any:
        return argparse.Namespace(method=str(len(losses)), losses=losses)

    found = gpu_quality.comparison([made({0: 9.0, 50: 5.0, 100: 4.0}), made({0: 9.0, 50: 6.0})])
    assert found == {"compared_at_step": 50, "eval_loss": {"3": 5.0, "2": 6.0}}
    assert gpu_quality.comparison([made({0: 9.0, 50: 5.0}), made({0: 9.0})]) is None


def test_outcomes_of_tests_are_written_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import os\nimport pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2, 'as it should'\n"
        "@pytest.mark.skip(reason='not here')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no device')\n"
        "def test_broken(broken): pass\n"
        "def test_dies(): os._exit(9)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "pytest_lines", "-p", "no:cacheprovider", "--lines", "x.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "tools")}
    subprocess.run([*command, "test_a.py"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    found = read(tmp_path / "x.jsonl")
    outcomes = [(row["test"].partition("::")[2], row["outcome"]) for row in found]
    assert outcomes == [
        ("test_passes", "passed"), ("test_fails", "failed"), ("test_skipped", "skipped"), ("test_broken", "failed"),
    ]  # fmt: skip
    assert "as it should" in found[1]["message"] and "no device" in found[3]["message"]
    (tmp_path / "test_b.py").write_text("import nothing_of_this_name\n")
    subprocess.run([*command, "test_b.py"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert "nothing_of_this_name" in read(tmp_path / "x.jsonl")[-1]["message"]
