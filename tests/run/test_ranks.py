"""Two ranks, under DeepSpeed's launcher and torchrun; checkpoints that every engine and number of ranks reads."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support.runs import (
    REPO,
    TIMEOUT_S,
    Corpus,
    Process,
    deepspeed,
    final_tensors,
    free_port,
    kill_after_a_checkpoint,
    last_step,
    metrics,
    outcome,
    saved_steps,
    tiny_config,
    torchrun,
    train_here,
    trajectory,
    write_config,
)

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 60
EVERY = 20
ZERO = "parallel.engine=zero"


@pytest.fixture(scope="module")
def config(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny_config(
        corpus,
        data={"workers": 1},
        train={"steps": STEPS, "micro_batch": 2},
        eval={"every": 10},
        checkpoint={"every": EVERY, "keep": 9},
    )
    return write_config(tmp_path_factory.mktemp("ranks") / "config.yaml", values)


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks under DeepSpeed's launcher, from the beginning to the end."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with deepspeed(config, run_dir, ZERO) as process:
        assert process.wait() == 0, process.stderr[-4000:]
        assert "perplexity" in process.stdout
    return run_dir


def assert_close(got: Path, want: Path, first: int = 0) -> None:
    """Compares two runs from the line of update `first` on: equal but for the order of float32 sums."""
    wanted = [line for line in trajectory(want) if line["step"] >= first]
    lines = [line for line in trajectory(got) if line["step"] >= first]
    assert [list(line) for line in lines] == [list(line) for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        for key, value in other.items():
            # The norm of a gradient is far more sensitive to rounding than the loss.
            assert line[key] == pytest.approx(value, rel=1e-3 if key == "grad_norm" else 1e-5), (key, line["step"])


def test_deepspeed_launcher(uninterrupted: Path) -> None:
    lines = metrics(uninterrupted)
    assert outcome(uninterrupted) == {"code": 0, "reason": "done", "step": STEPS}
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(evaluations) == 1 + STEPS // 10
    assert evaluations[-1] < evaluations[0] - 1
    assert saved_steps(uninterrupted) == [20, 40, 60]
    assert not (uninterrupted.parent / "extensions").exists(), "DeepSpeed compiled what training does not need"


def test_stopped_under_ddp_then_killed_and_resumed_under_zero(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with torchrun(config, run_dir) as process:
        process.until(lambda: last_step(run_dir) >= 3, "step 3")
        signalled = process.children()[-1]
        process.send_to(signalled, signal.SIGUSR2)
        assert process.wait() != 0
    stopped_at = last_step(run_dir)
    ended = outcome(run_dir)
    assert (ended["code"], ended["step"]) == (75, stopped_at)
    assert "SIGUSR2" in ended["reason"]
    assert saved_steps(run_dir) == [stopped_at]
    assert stopped_at < EVERY

    with torchrun(config, run_dir, ZERO) as process:
        kill_after_a_checkpoint(process, run_dir, EVERY)
    killed = trajectory(run_dir)
    assert outcome(run_dir)["code"] is None
    log = (run_dir / "log.txt").read_text()
    assert "changed since then: parallel.engine: 'ddp' → 'zero'" in log

    with torchrun(config, run_dir, ZERO) as process:
        assert process.wait() == 0, process.stderr[-4000:]
    again = trajectory(run_dir)
    assert again[: len(killed)] == killed, "the updates after the checkpoint came out differently"
    assert_close(run_dir, uninterrupted)
    assert outcome(run_dir)["code"] == 0


def test_ranks_whose_launcher_was_killed_save_and_end(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with torchrun(config, run_dir, "train.steps=100000", "eval.source=null", "checkpoint.every=0") as process:
        process.until(lambda: last_step(run_dir) >= 3, "step 3")
        ranks = process.children()
        process.send(signal.SIGKILL)
        process.wait()
    try:
        end = time.monotonic() + TIMEOUT_S
        while outcome(run_dir)["code"] is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
    ended = outcome(run_dir)
    assert (ended["code"], ended["step"]) == (75, last_step(run_dir))
    assert "the launcher of this process is gone" in ended["reason"]
    assert saved_steps(run_dir) == [last_step(run_dir)]


def test_zero_on_two_ranks_goes_on_as_ddp_on_one(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    saved = uninterrupted / "checkpoints" / f"step_{EVERY:08d}"
    assert train_here(config, run_dir, f"checkpoint.resume={saved}", "train.micro_batch=8") == 0
    assert_close(run_dir, uninterrupted, first=EVERY + 1)
    log = (run_dir / "log.txt").read_text()
    assert f"resumed from {saved} at update {EVERY}" in log
    assert "changed since then: parallel.engine: 'zero' → 'ddp'" in log
    assert "changed since then: train.micro_batch: 2 → 8" in log
    assert final_tensors(run_dir).keys() == final_tensors(uninterrupted).keys()


def test_zero_2_goes_on_as_fsdp_with_per_layer_updates_and_then_as_zero_3(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    saved = uninterrupted / "checkpoints" / f"step_{EVERY:08d}"
    checks = ("train.sanity_checks=true", "parallel.shard=all")
    per_layer = ("optim.update=per_layer", "optim.clip_mode=two_pass", "train.micro_batch=4")  # clips exactly
    fsdp = (f"checkpoint.resume={saved}", "parallel.engine=fsdp", *per_layer)
    with torchrun(config, run_dir, *fsdp, *checks) as process:
        kill_after_a_checkpoint(process, run_dir, 2 * EVERY)

    recompute = ("train.activation_checkpointing=full", "parallel.zero_stage=3")
    with torchrun(config, run_dir, ZERO, *recompute, *checks) as process:
        assert process.wait() == 0, process.stderr[-4000:]
    assert_close(run_dir, uninterrupted, first=EVERY + 1)
    assert final_tensors(run_dir).keys() == final_tensors(uninterrupted).keys()

    log = (run_dir / "log.txt").read_text()
    assert "full rank" in log and "measured: " in log
    sent = [line["sent_all_gather_bytes"] for line in metrics(run_dir) if "sent_all_gather_bytes" in line]
    assert len(sent) > EVERY
    assert min(sent) > 0


@pytest.mark.parametrize("stray", ["seed", "code"])
def test_a_stray_rank_stops_all(config: Path, tmp_path: Path, stray: str) -> None:
    """Two ranks started by hand, one with another seed, or with another version of the code."""
    other = tmp_path / "other"
    for part in ("sltrain_dist", "launch"):
        shutil.copytree(REPO / part, other / part, ignore=shutil.ignore_patterns("__pycache__"))
    if stray == "code":
        with (other / "sltrain_dist" / "errors.py").open("a") as file:
            file.write("# another version\n")
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    with ExitStack() as stack:
        for rank, repo in enumerate((REPO, other)):
            names = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = ["env", *(f"{key}={value}" for key, value in names.items()), sys.executable]
            arguments = ["--config", config, f"run_dir={tmp_path / 'run'}", "parallel.timeout_s=60"]
            if rank == 1 and stray == "seed":
                arguments.append("seed=4")
            started = Process([*command, repo / "launch" / "pretrain.py", *arguments], tmp_path / f"rank_{rank}")
            processes.append(stack.enter_context(started))
        assert [process.wait() for process in processes] == [2, 2]
    said = {"seed": "seed (rank 0: 3, rank 1: 4)", "code": "code (rank 0: "}[stray]
    assert "the ranks do not run the same thing" in processes[0].stderr  # once, not by every rank
    assert said in processes[0].stderr
