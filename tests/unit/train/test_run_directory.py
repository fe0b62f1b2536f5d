"""A run directory serves one run at a time, and exit.json says how it ended, also where the disk is full."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.config.load import build_config, load_config
from sltrain_dist.errors import ConfigError, ExitCode, StorageError
from sltrain_dist.train import run_directory
from sltrain_dist.train.run_directory import Outcome, RunDirectory

DONE = Outcome(ExitCode.DONE, "done", 6)
TYPING_ERROR = Outcome(ExitCode.CONFIG, "typing error", 0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDirectory]:
    made = RunDirectory(tmp_path / "runs" / "run")
    yield made
    made.release()


def said(run_dir: RunDirectory) -> tuple[int | None, str, int | None]:
    values = json.loads((run_dir.path / "exit.json").read_text())
    assert time.strptime(values["time"], "%Y-%m-%dT%H:%M:%S%z")
    return values["code"], values["reason"], values["step"]


def failing(number: int) -> Any:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_running_then_done(run_dir: RunDirectory) -> None:
    run_dir.claim()
    assert said(run_dir) == (None, "running, or killed before it could say why", None)
    assert run_dir.write_outcome(DONE) is None
    assert said(run_dir) == (0, "done", 6)
    assert [path.name for path in run_dir.path.iterdir()] == ["exit.json"]


def test_the_first_rank_to_say_why_counts(run_dir: RunDirectory) -> None:
    """Whoever claimed the directory."""
    run_dir.claim()
    assert RunDirectory(run_dir.path).write_outcome(Outcome(ExitCode.DATA, "corrupt", 4)) is None
    assert run_dir.write_outcome(Outcome(ExitCode.UNEXPECTED, "lost peer", 4)) == "corrupt"
    assert said(run_dir) == (3, "corrupt", 4)


def test_an_earlier_run_does_not(run_dir: RunDirectory) -> None:
    run_dir.claim()
    run_dir.write_outcome(Outcome(ExitCode.DATA, "corrupt", 4))
    run_dir.release()
    run_dir.claim()
    assert run_dir.write_outcome(Outcome(ExitCode.DIVERGED, "NaN", 5)) is None
    assert said(run_dir) == (4, "NaN", 5)


def test_one_run_at_a_time(run_dir: RunDirectory) -> None:
    run_dir.claim()
    other = RunDirectory(run_dir.path)
    for each in (run_dir, other):
        with pytest.raises(ConfigError, match="is in use by another run"):
            each.claim()
    other.release()  # it is not theirs
    with pytest.raises(ConfigError, match="is in use by another run"):
        other.claim()
    run_dir.release()
    other.claim()
    other.release()


def test_not_beside_another_process(run_dir: RunDirectory) -> None:
    run_dir.claim()
    run_dir.release()
    program = f"""
import sys
from pathlib import Path
from sltrain_dist.train.run_directory import RunDirectory
run_dir = RunDirectory(Path({str(run_dir.path)!r}))
run_dir.claim()
print("claimed", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        theirs = (run_dir.path / "exit.json").read_bytes()
        with pytest.raises(ConfigError, match="is in use by another run"):
            run_dir.claim()
        run_dir.write_failed_start(TYPING_ERROR)
        assert (run_dir.path / "exit.json").read_bytes() == theirs
        other.kill()
    run_dir.claim()  # a killed run does not hold its directory


def test_failed_start(run_dir: RunDirectory) -> None:
    run_dir.write_failed_start(TYPING_ERROR)
    assert not run_dir.path.exists()
    run_dir.path.mkdir(parents=True)
    run_dir.write_failed_start(TYPING_ERROR)
    assert said(run_dir) == (2, "typing error", 0)
    RunDirectory(run_dir.path).write_failed_start(TYPING_ERROR)
    run_dir.claim()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_it_is_overwritten_in_place(
    run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run_dir.claim()
    path = run_dir.path / "exit.json"
    inode = path.stat().st_ino
    monkeypatch.setattr(run_directory, "write_whole", failing(number))
    run_dir.write_outcome(Outcome(ExitCode.STORAGE, "no space left " * 1000, 3))
    code, _, step = said(run_dir)
    assert (code, step) == (6, 3)
    assert path.stat().st_ino == inode
    assert path.stat().st_size < 4096, "it would need another block"
    run_dir.release()
    run_dir.claim()  # nor is the next start stopped by the full disk alone
    assert said(run_dir)[0] is None
    run_dir.write_outcome(DONE)
    assert said(run_dir)[1] == "done", "nothing of the longer one may be left behind it"


def test_where_nothing_can_be_written_the_error_says_so(run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "write_whole", failing(errno.ENOSPC))
    message = r"run_dir = .*run cannot be written \(No space left on device\); free space"
    with pytest.raises(StorageError, match=message):
        run_dir.claim()
    with pytest.raises(StorageError, match=message):
        run_dir.write_config(load_config(None, ["train.steps=1"]))


def test_what_can_never_be_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be written to .*; choose another"):
            RunDirectory(place).claim()


def test_leftovers_of_killed_writes_go_at_the_next_start(run_dir: RunDirectory) -> None:
    run_dir.path.mkdir(parents=True)
    for name in (".exit.json.0a1b.tmp", ".metrics.jsonl.ffff.tmp"):
        (run_dir.path / name).write_text("half")
    (run_dir.path / ".mine").touch()
    run_dir.claim()
    assert sorted(path.name for path in run_dir.path.iterdir()) == [".mine", "exit.json"]


def test_a_damaged_exit_json_is_replaced(run_dir: RunDirectory) -> None:
    run_dir.claim()
    for content in ("[" * 100_000, "{", "{}", "", "null", '{"code": 3}'):
        (run_dir.path / "exit.json").write_text(content)
        there = run_dir.write_outcome(DONE)
        if content.endswith("3}"):
            assert there == "None"
        else:
            assert (there, said(run_dir)) == (None, (0, "done", 6))


def test_of_several_ranks_one_says_why(run_dir: RunDirectory) -> None:
    """However close together they are."""
    run_dir.claim()
    with ThreadPoolExecutor(8) as pool:
        outcomes = [Outcome(ExitCode.DATA, f"rank {rank}", rank) for rank in range(8)]
        others = list(pool.map(RunDirectory(run_dir.path).write_outcome, outcomes))
    assert others.count(None) == 1
    assert {other for other in others if other is not None} == {said(run_dir)[1]}


def test_a_failed_start_is_recorded_before_a_signal_ends_the_process(tmp_path: Path) -> None:
    """As torchrun ends a rank when the other one has failed."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from sltrain_dist.errors import ExitCode\n"
        "from sltrain_dist.train import run_directory\n"
        "write = run_directory.write_whole\n"
        "def interrupted(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    write(*arguments)\n"
        "run_directory.write_whole = interrupted\n"
        "outcome = run_directory.Outcome(ExitCode.CONFIG, 'typing error', 0)\n"
        "run_directory.RunDirectory(Path(sys.argv[1])).write_failed_start(outcome)\n"
        "print('still running')\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGTERM and result.stdout == ""
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == ExitCode.CONFIG


def test_a_dry_run_has_a_directory_of_its_own(tmp_path: Path) -> None:
    for dry_run, path in ((False, tmp_path), (True, tmp_path / "dry_run")):
        config = build_config({"run_dir": str(tmp_path), "train": {"steps": 1, "dry_run": dry_run}})
        assert RunDirectory.of(config).path == path


def test_the_configuration_can_be_read_back(tmp_path: Path) -> None:
    config = build_config({"train": {"steps": 7}})
    RunDirectory(tmp_path).write_config(config)
    assert load_config(tmp_path / "config.yaml") == config


def test_the_newest_step_is_that_of_a_complete_checkpoint(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    assert run_dir.newest_step() == 0
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json").touch()
    assert run_dir.newest_step() == 4
