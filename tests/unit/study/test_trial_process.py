"""The processes of a study, with shell scripts in the place of training."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sltrain_dist.config.load import load_config
from sltrain_dist.errors import ConfigError, ExitCode
from sltrain_dist.study.run_study import failure_line, run_study
from sltrain_dist.study.study_directory import claimed
from sltrain_dist.study.trial_process import Resources, TrialPool
from tests.support.studies import make_study

Script = Callable[[str], None]
ARMS = {"a": {"lrs": [0.01]}, "b": {"lrs": [0.01]}}
LONGEST_S = 60.0


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Sets what is started instead of Python, as the body of a shell script."""

    def write(body: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    assert {number: signal.getsignal(number) for number in numbers} == handlers, "a study restores them"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_trial_is_the_training_command_with_its_threads(tmp_path: Path, script: Script) -> None:
    """It keeps the study's directory locked after the study has gone, and is killed if the study fails."""
    script('echo "$OMP_NUM_THREADS $*"; exec sleep 60')
    study = make_study(tmp_path, arms=ARMS, seeds=[1])
    (trial,) = study.reported("a", 3840, 0.01)
    output = trial.run_dir / "output.txt"
    pool: TrialPool
    with pytest.raises(ZeroDivisionError):
        with claimed(study) as descriptor:
            pool = TrialPool(Resources(jobs=1, threads=3, inherited=descriptor), lambda config: config)
            pool.start(trial)
        with pool.open():
            assert pool.is_full and pool.names == {trial.name}
            until(lambda: output.read_text().endswith("\n"))
            with pytest.raises(ConfigError, match="by trials that a killed one has left behind"), claimed(study):
                pass
            raise ZeroDivisionError
    config = trial.run_dir / "config.yaml"
    assert output.read_text() == f"3 -m sltrain_dist train --config {config}\n"
    assert load_config(config) == trial.config
    with claimed(study):  # its process is gone
        pass


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ("exit 3", 3, "its process ended without saying why"),
        ("kill -9 $$", -9, "its process was killed by signal 9"),
        ("exit 0", 0, "its process ended without saying why"),
    ],
)
def test_a_process_that_says_nothing_has_failed(
    tmp_path: Path, script: Script, body: str, code: int, reason: str
) -> None:
    """It is started once, and the others are started all the same."""
    script(f"echo started; {body}")
    said: list[str] = []
    study = make_study(tmp_path, arms=ARMS, seeds=[1])
    outcome = run_study(study, 1, 1, said.append)
    assert outcome.exit_code is ExitCode.UNEXPECTED and outcome.stopped is None
    assert [(each.trial.arm, each.exit_code, each.reason) for each in outcome.failed] == [
        ("a", code, reason),
        ("b", code, reason),
    ]
    for each in outcome.failed:
        assert (each.trial.run_dir / "output.txt").read_text() == "started\n"
        assert failure_line(each).startswith(f"{each.trial.name}: exit code {code}: {reason}")
    assert [line.partition(":")[0] for line in said] == ["started", "0 of 2", "started", "0 of 2"]


def test_a_stop_file_ends_all_processes_and_starts_no_other(tmp_path: Path, script: Script) -> None:
    script("trap 'exit 75' TERM; echo started; while :; do sleep 0.05; done")
    study = make_study(tmp_path, arms={**ARMS, "c": {"lrs": [0.01]}}, seeds=[1])
    outputs = [study.reported(arm, 3840, 0.01)[0].run_dir / "output.txt" for arm in "abc"]
    stop_file = study.directory / "STOP"

    def stop_later() -> None:
        until(lambda: all(path.exists() and path.read_text() for path in outputs[:2]))
        stop_file.touch()

    thread = threading.Thread(target=stop_later)
    thread.start()
    outcome = run_study(study, 2, 1, lambda line: None)
    thread.join()
    assert outcome.exit_code is ExitCode.STOPPED_EARLY and outcome.stopped == f"found {stop_file}"
    assert not stop_file.exists() and not outputs[2].exists() and outcome.failed == []
