"""A process that makes no progress ends, whatever holds it; so does a launcher that outlives its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sltrain_dist.runtime import reaper, watchdog
from tests.support.paths import REPO

LONG_S = 60
"""Nothing here should take so long; what does has hung."""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that uses the watchdog `dog`, with a limit of half a second."""
    lines = (
        "import ctypes, sys, time",
        "from sltrain_dist.runtime import watchdog",
        "dog = watchdog.Watchdog('rank 1 on h2', 0.5, 'parallel.timeout_s = 0.5')",
        code,
    )
    command = [sys.executable, "-c", "\n".join(lines), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONG_S, check=False)


def test_no_progress_ends_the_process(tmp_path: Path) -> None:
    told = tmp_path / "told"
    ended = run(
        """
from pathlib import Path
dog.report_to(Path(sys.argv[1]).write_text)
for _ in range(10):
    time.sleep(0.1)
    dog.beat("computing")
print("alive", flush=True)
time.sleep(60)
""",
        str(told),
    )
    assert ended.returncode == 1
    assert ended.stdout == "alive\n", "progress keeps it alive for longer than the limit"
    assert "error: rank 1 on h2 has made no progress for " in ended.stderr
    assert "(parallel.timeout_s = 0.5) while computing" in ended.stderr
    assert "in <module>" in ended.stderr, "the stuck line is shown"
    assert told.read_text() in ended.stderr


def test_more_time_is_allowed_while_warming_up() -> None:
    ended = run("dog.allow(0.7)\ntime.sleep(1)\nprint('warm', flush=True)\ndog.allow(0)\ntime.sleep(60)")
    assert ended.returncode == 1
    assert ended.stdout == "warm\n"


def test_a_report_that_hangs_does_not_keep_the_process() -> None:
    ended = run("watchdog._REPORT_S = 0.1\ndog.report_to(lambda reason: time.sleep(60))\ntime.sleep(60)")
    assert ended.returncode == 1
    assert "no progress" in ended.stderr


@pytest.mark.slow
def test_an_interpreter_that_is_stuck_itself() -> None:
    """A call that keeps the interpreter's lock: no thread in Python could do anything about it."""
    ended = run("ctypes.PyDLL(None).sleep(60)")
    assert ended.returncode == 1
    assert "no progress" not in ended.stderr
    assert "Timeout" in ended.stderr


def test_ending_must_be_over_in_time() -> None:
    ended = run("dog.hurry(0.2)\nwhile True:\n    time.sleep(0.05)\n    dog.beat('computing')")
    assert ended.returncode == 1
    assert "while" in ended.stderr


def test_a_sign_of_life_every_second() -> None:
    ended = run(
        """
dog.stop()
dog = watchdog.Watchdog("rank 1", 30, "", lambda: print("alive", flush=True))
time.sleep(2.5)
dog.stop()
"""
    )
    assert 2 <= ended.stdout.count("alive") <= 9


def test_stopped() -> None:
    assert run("dog.stop()\ntime.sleep(1)\nctypes.PyDLL(None).sleep(1)").returncode == 0


def test_alone_nothing_is_watched() -> None:
    watchdog.start(0, 1, 0, 5)
    assert watchdog._watchdog is None
    watchdog.beat("computing")
    watchdog.stop()


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
LAUNCHER = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}])
print(rank.pid, flush=True)
time.sleep(60)
"""
RANK = """
import os, subprocess, sys
from sltrain_dist.runtime import reaper
code = "from sltrain_dist.runtime import reaper; reaper.PATIENCE_S = 0.5; reaper._TERM_S = 0.3; reaper.main()"
listener = subprocess.Popen([sys.executable, "-c", code, *sys.argv[1:3], "1.5", "rank 0 on h1"], stdin=subprocess.PIPE)
"""
"""Stands for a rank; its reaper calls half a second without an end too long, and one and a half of silence."""


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[tuple[reaper.Process, reaper.Process]]:
    """A launcher and one of its ranks, neither of which heeds SIGTERM."""
    (tmp_path / "torchrun").write_text(LAUNCHER)
    with subprocess.Popen([sys.executable, tmp_path / "torchrun"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            rank = reaper.Process.of(int(process.stdout.readline()))
            found = reaper.Process.of(process.pid)
            assert process.stdout.readline() == "up\n"
            assert found is not None
            assert rank is not None
            yield found, rank
            rank.signal(signal.SIGKILL)
        finally:
            process.kill()


def dies(process: reaper.Process) -> bool:
    """Whether a process that was killed goes, for which a busy machine takes its time."""
    end = time.monotonic() + LONG_S
    while process.runs and time.monotonic() < end:
        time.sleep(0.01)
    return not process.runs


def run_rank(launcher: reaper.Process, code: str) -> subprocess.CompletedProcess[str]:
    """A rank that tells its reaper about itself; returns when both have ended."""
    return subprocess.run(
        [sys.executable, "-c", RANK + code, str(launcher.pid), launcher.started],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


@pytest.mark.parametrize("last_words", ["", "listener.stdin.write(reaper.ALIVE)"])
def test_a_launcher_that_outlives_its_ranks(launcher: tuple[reaper.Process, reaper.Process], last_words: str) -> None:
    process, other_rank = launcher
    assert process.is_launcher
    assert not other_rank.is_launcher
    seen = run_rank(process, last_words)
    assert dies(process)
    assert dies(other_rank)
    assert f"rank 0 on h1 has ended 0 s ago, but its launcher (process {process.pid}) has not" in seen.stderr


def test_a_launcher_whose_ranks_have_ended_well(launcher: tuple[reaper.Process, reaper.Process]) -> None:
    process, other_rank = launcher
    seen = run_rank(process, "listener.stdin.write(reaper.ALIVE + reaper.ENDED_WELL); listener.stdin.close()")
    assert seen.stderr == ""
    assert process.runs
    assert other_rank.runs


def test_a_frozen_rank(launcher: tuple[reaper.Process, reaper.Process]) -> None:
    process, _ = launcher
    seen = run_rank(process, "os.kill(os.getpid(), 19)")
    assert seen.returncode == -signal.SIGKILL
    assert "rank 0 on h1 has been frozen for 2 s" in seen.stderr
    assert dies(process)


def test_a_launcher_that_ends_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"]) as process:
        launcher = reaper.Process.of(process.pid)
        assert launcher is not None
        begun = time.monotonic()
        reaper.reap(launcher, "rank 0 on h1", LONG_S)
        assert time.monotonic() - begun < LONG_S
    assert process.returncode == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -m torch.distributed.run --nnodes 2", True),
        ("/venv/bin/python /venv/bin/torchrun --nnodes 2", True),
        ("/venv/bin/python -u -m deepspeed.launcher.launch --world_info=x", True),
        ("/venv/bin/python3.11 /venv/bin/deepspeed --num_gpus 8", True),
        ("python -W ignore -m deepspeed.launcher.runner", True),
        ("bash train.sh torchrun.yaml", False),
        ("timeout 3600 torchrun --nnodes 2", False),
        ("python submit.py torchrun", False),
        ("slurmstepd: [5.0]", False),
        ("python launch/pretrain.py --config x.yaml run_dir=torchrun/x", False),
    ],
)
def test_what_a_launcher_is(command: str, expected: bool) -> None:
    assert reaper.Process(1, "0", tuple(command.split())).is_launcher == expected
