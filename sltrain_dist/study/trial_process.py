"""The processes that train the trials: the ordinary training command, several at a time (no torch)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sltrain_dist.config.load import to_yaml
from sltrain_dist.config.run_files import CONFIG
from sltrain_dist.config.schema import Config
from sltrain_dist.files import make_directory, write_whole, writing
from sltrain_dist.study.study_file import Trial

OUTPUT = "output.txt"
"""File in a trial's run directory with what its process has printed."""

_POLL_S = 0.1
_KILLED_S = 30.0
"""Time that a process gets to end after it was killed."""


@dataclass(frozen=True)
class Resources:
    """What a trial's process may use.

    Attributes:
        jobs: Number of trials that run at a time.
        threads: Number of CPU threads of each.
        inherited: Descriptor that the processes inherit, and so keep open; see `study_directory.claimed`.
    """

    jobs: int
    threads: int
    inherited: int


class TrialPool:
    """The running processes of a study.

    Args:
        resources: What the processes may use.
        adjust: Returns the configuration that a trial is run with, from its own.
    """

    def __init__(self, resources: Resources, adjust: Callable[[Config], Config]) -> None:
        self._resources, self._adjust = resources, adjust
        self._running: dict[str, tuple[Trial, subprocess.Popen[bytes]]] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the trials that are running."""
        return frozenset(self._running)

    @property
    def is_full(self) -> bool:
        """Whether as many trials are running as may."""
        return len(self._running) >= self._resources.jobs

    def start(self, trial: Trial) -> None:
        """Starts a trial, or resumes it from its newest checkpoint.

        Raises:
            StorageError: Its run directory cannot be written.
        """
        with writing(f"run_dir = {trial.run_dir}"):
            make_directory(trial.run_dir)
            write_whole(trial.run_dir / CONFIG, to_yaml(self._adjust(trial.config)))
            output = (trial.run_dir / OUTPUT).open("ab")
        command = [sys.executable, "-m", "sltrain_dist", "train", "--config", str(trial.run_dir / CONFIG)]
        with output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": str(self._resources.threads)},
                pass_fds=(self._resources.inherited,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        self._running[trial.name] = trial, process

    def ended(self) -> Iterator[tuple[Trial, int]]:
        """Waits a moment, then yields (trial, exit code) of the processes that have ended.

        The exit code is the negative number of the signal if the process was killed.
        """
        time.sleep(_POLL_S)
        for name, (trial, process) in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[name]
                yield trial, code

    def stop(self) -> None:
        """Asks all processes to save and end. Returns at once."""
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)

    @contextmanager
    def open(self) -> Iterator[TrialPool]:
        """Yields this pool, and kills what is left of it if the block raises. Killed trials can be resumed."""
        try:
            yield self
        finally:
            for _, process in self._running.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with its data workers
            for _, process in self._running.values():
                process.wait(_KILLED_S)
            self._running.clear()
