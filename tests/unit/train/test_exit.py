"""exit.json says how a run ended, also where the disk is full."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.errors import ConfigError, ExitCode, StorageError
from sltrain_dist.train import exit as exit_module
from sltrain_dist.train.exit import Outcome, claim, release, write_outcome

DONE = Outcome(ExitCode.DONE, "done", 6)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    release(tmp_path / "run")


def said(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "exit.json").read_text())
    return values


def failing(number: int) -> Any:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_it_is_overwritten_in_place(run_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    claim(run_dir)
    inode = (run_dir / "exit.json").stat().st_ino
    monkeypatch.setattr(exit_module, "write_whole", failing(number))
    write_outcome(run_dir, Outcome(ExitCode.STORAGE, "no space left " * 1000, 3))
    assert (said(run_dir)["code"], said(run_dir)["step"]) == (6, 3)
    assert (run_dir / "exit.json").stat().st_ino == inode
    assert (run_dir / "exit.json").stat().st_size < 4096, "it would need another block"
    release(run_dir)
    claim(run_dir)  # nor is the next start stopped by the full disk alone
    assert said(run_dir)["code"] is None
    write_outcome(run_dir, DONE)
    assert said(run_dir)["reason"] == "done", "nothing of the longer one may be left behind it"


def test_where_nothing_can_be_written_the_error_says_so(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_module, "write_whole", failing(errno.ENOSPC))
    with pytest.raises(
        StorageError, match=r"run_dir = .*run cannot be written \(No space left on device\); free space"
    ):
        claim(run_dir)


def test_what_can_never_be_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be written to .*; choose another"):
            claim(place)


def test_leftovers_of_killed_writes_go_at_the_next_start(run_dir: Path) -> None:
    run_dir.mkdir()
    for name in (".exit.json.0a1b.tmp", ".metrics.jsonl.ffff.tmp"):
        (run_dir / name).write_text("half")
    (run_dir / ".mine").touch()
    claim(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == [".mine", "exit.json"]


def test_a_damaged_exit_json_is_replaced(run_dir: Path) -> None:
    claim(run_dir)
    for content in ("[" * 100_000, "{}", "", "null", '{"code": 3}'):
        (run_dir / "exit.json").write_text(content)
        write_outcome(run_dir, DONE)
        assert said(run_dir)["code"] == (3 if content.endswith("3}") else 0)


def test_of_several_ranks_one_says_why(run_dir: Path) -> None:
    """However close together they are."""
    claim(run_dir)
    with ThreadPoolExecutor(8) as pool:
        outcomes = [Outcome(ExitCode.DATA, f"rank {rank}", rank) for rank in range(8)]
        others = list(pool.map(lambda outcome: write_outcome(run_dir, outcome), outcomes))
    assert others.count(None) == 1
    assert {other for other in others if other is not None} == {said(run_dir)["reason"]}


def test_a_failed_start_is_recorded_before_a_signal_ends_the_process(tmp_path: Path) -> None:
    """As torchrun ends a rank when the other one has failed."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from sltrain_dist.errors import ExitCode\n"
        "from sltrain_dist.train import exit\n"
        "write = exit.write_whole\n"
        "def interrupted(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    write(*arguments)\n"
        "exit.write_whole = interrupted\n"
        "exit.write_failed_start(Path(sys.argv[1]), exit.Outcome(ExitCode.CONFIG, 'typing error', 0))\n"
        "print('still running')\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGTERM and result.stdout == ""
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == ExitCode.CONFIG
