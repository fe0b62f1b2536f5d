"""A rank notices that the launcher above it is gone, whatever is in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPO

RANK = """
import sys
from sltrain_dist.runtime.launchers import lost_launcher
print(lost_launcher(), flush=True)
for line in sys.stdin:
    print(lost_launcher(), flush=True)
"""
PARENT = """
import subprocess, sys, time
process = subprocess.Popen(sys.argv[1:])
print(process.pid, flush=True)
process.wait()
"""


class Chain:
    """Processes that have started one another, the last of which is a rank."""

    def __init__(self, *commands: list[str | Path]) -> None:
        words = [word for command in commands for word in command]
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        self._first = subprocess.Popen(
            [*words, sys.executable, "-c", RANK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.pids = [self._first.pid, *(int(self._line()) for _ in commands)]
        self.first_said = self._line()

    def _line(self) -> str:
        assert self._first.stdout is not None
        return self._first.stdout.readline().rstrip()

    def ask(self) -> str:
        """What the rank says now."""
        assert self._first.stdin is not None
        self._first.stdin.write("\n")
        self._first.stdin.flush()
        return self._line()

    def kill(self, index: int) -> None:
        """Kills one of the processes, and waits until it is dead."""
        os.kill(self.pids[index], signal.SIGKILL)
        if index == 0:
            self._first.wait()

    def close(self) -> None:
        for pid in self.pids[1:]:
            os.kill(pid, signal.SIGKILL)
        with self._first:
            self._first.kill()


@pytest.fixture
def torchrun(tmp_path: Path) -> list[str | Path]:
    (tmp_path / "torchrun").write_text(PARENT)
    return [sys.executable, tmp_path / "torchrun"]


@pytest.fixture
def shell(tmp_path: Path) -> list[str | Path]:
    (tmp_path / "run.sh").write_text(PARENT)
    return [sys.executable, tmp_path / "run.sh"]


@pytest.fixture
def chains() -> Iterator[list[Chain]]:
    made: list[Chain] = []
    yield made
    for chain in made:
        chain.close()


def test_a_launcher_that_is_killed(chains: list[Chain], torchrun: list[str | Path], shell: list[str | Path]) -> None:
    chain = Chain(torchrun, shell)
    chains.append(chain)
    assert (chain.first_said, chain.ask()) == ("None", "None")
    chain.kill(0)
    said = chain.ask()
    assert "the launcher of this process is gone" in said
    assert f"torchrun, process {chain.pids[0]})" in said


def test_a_shell_that_is_killed_is_no_launcher(
    chains: list[Chain], torchrun: list[str | Path], shell: list[str | Path]
) -> None:
    """So a run goes on when the session that has started it in the background is over."""
    chain = Chain(shell, torchrun)
    chains.append(chain)
    chain.kill(0)
    assert chain.ask() == "None"


def test_a_deepspeed_command_that_is_killed_before_the_rank_has_begun(chains: list[Chain], tmp_path: Path) -> None:
    """Only its launcher is left, and that it was adopted shows."""
    path = tmp_path / "deepspeed" / "launcher" / "launch.py"
    path.parent.mkdir(parents=True)
    path.write_text("import sys; sys.stdin.readline()\n" + PARENT)
    (tmp_path / "deepspeed" / "deepspeed").write_text(PARENT)
    command = [sys.executable, tmp_path / "deepspeed" / "deepspeed", sys.executable, path, sys.executable, "-c", RANK]
    first = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        start_new_session=True,
    )
    assert first.stdin is not None
    assert first.stdout is not None
    launcher = int(first.stdout.readline())
    first.kill()
    first.wait()
    first.stdin.write("\n")
    first.stdin.flush()
    rank = int(first.stdout.readline())
    assert first.stdout.readline() == f"the deepspeed command that started process {launcher} is gone\n"
    first.stdin.close()
    for pid in (rank, launcher):
        os.kill(pid, signal.SIGKILL)
    first.stdout.close()
