"""A run's directory: one run at a time, and `exit.json`, because launchers do not preserve exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltrain_dist.checkpoint.manifest import list_checkpoints
from sltrain_dist.config.load import to_yaml
from sltrain_dist.config.run_files import CHECKPOINTS, CONFIG, DRY_RUN, EXIT
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError, ExitCode, StorageError
from sltrain_dist.files import (
    NO_SPACE,
    TEMPORARY,
    has_its_name,
    lock,
    make_directory,
    storage_message,
    sync_path,
    write_whole,
    writing,
)

_MAX_REASON_IN_PLACE = 300
"""Number of characters of a reason that fit into the smallest disk block in any encoding."""
_UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that can never be a run directory, unlike those of a disk that is full or failing."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: Exit code.
        reason: One sentence for the user.
        step: Number of updates made.
    """

    code: ExitCode
    reason: str
    step: int


class RunDirectory:
    """The directory that a run writes to. Every rank has this object; the main rank claims the directory for all.

    Attributes:
        path: The directory.
        checkpoints: The directory of its checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / CHECKPOINTS
        self._exit = path / EXIT
        self._locked: int | None = None
        """Descriptor of the directory while this object holds its lock, which the system releases at a kill."""

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        """Returns the directory of a run. Dry runs have their own, inside that of the run."""
        return cls(Path(config.run_dir, DRY_RUN) if config.train.dry_run else Path(config.run_dir))

    def claim(self) -> None:
        """Creates the directory, locks it for this run, and writes to exit.json that the run is in progress.

        If exit.json still says so when no process has locked the directory, the run was killed.

        Raises:
            ConfigError: The path cannot be a run directory, or another run is using it.
            StorageError: It cannot be written to, for example because the disk is full.
        """
        run_dir = f"run_dir = {self.path}"
        try:
            make_directory(self.path)
            if not self._lock():
                raise ConfigError(f"{run_dir} is in use by another run; wait for its end, or choose another")
            for leftover in self.path.glob(f".*{TEMPORARY}"):  # of processes that were killed while writing a file
                leftover.unlink(missing_ok=True)
            self._write(None, "running, or killed before it could say why", None)
        except OSError as error:
            if error.errno in _UNUSABLE_PATH:
                raise ConfigError(f"{run_dir} cannot be written to ({error.strerror}); choose another") from None
            raise StorageError(storage_message(run_dir, error)) from None

    def release(self) -> None:
        """Unlocks the directory for other runs, if this object has locked it."""
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def write_config(self, config: Config) -> None:
        """Writes the resolved configuration.

        Raises:
            StorageError: It cannot be written.
        """
        with writing(f"run_dir = {self.path}"):
            write_whole(self.path / CONFIG, to_yaml(config))

    def newest_step(self) -> int:
        """Returns the number of updates in the newest checkpoint; 0 if there is none."""
        saved = list_checkpoints(self.checkpoints)
        return saved[-1][0] if saved else 0

    def write_outcome(self, outcome: Outcome) -> str | None:
        """Records how the run ended, unless another rank has done so: later failures are consequences of the first.

        Returns:
            The reason that another rank has recorded, or None if this one was written.
        """
        with _exclusively(self._exit):
            present = self.recorded_reason()
            if present is not None:  # from this run, since claim() has replaced that of earlier runs
                return present
            self._write(outcome.code, outcome.reason, outcome.step)
            return None

    def recorded_reason(self) -> str | None:
        """Returns the reason in exit.json why a run has ended; None if there is none."""
        present = _read(self._exit)
        return None if present.get("code") is None else str(present.get("reason"))

    def write_failed_start(self, outcome: Outcome) -> None:
        """Records that a run could not start, unless another one is in progress in the directory."""
        # A rank that cannot lock the directory does not write, and when it ends, torchrun ends the rank that writes.
        allowed = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            if self.path.is_dir() and self._lock():
                self._write(outcome.code, outcome.reason, outcome.step)
        finally:
            self.release()
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)

    def _lock(self) -> bool:
        descriptor = os.open(self.path, os.O_RDONLY)
        if not lock(descriptor):
            os.close(descriptor)
            return False
        self._locked = descriptor
        return True

    def _write(self, code: ExitCode | None, reason: str, step: int | None) -> None:
        """Replaces exit.json. On a full disk it is overwritten in place, in its existing block."""
        values = {"code": code, "reason": reason, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            write_whole(self._exit, json.dumps(values) + "\n")
        except OSError as error:
            if error.errno not in NO_SPACE or not self._exit.exists():
                raise
            shortened = json.dumps({**values, "reason": reason[:_MAX_REASON_IN_PLACE]}) + "\n"
            with self._exit.open("r+b") as file:
                file.write(shortened.encode())
                file.truncate()
            sync_path(self._exit)


@contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    """Locks a file against other ranks that read and replace it, if the file system supports locks."""
    with ExitStack() as stack:
        with suppress(OSError):
            locked = False
            while not locked:
                file = stack.enter_context(path.open("r+b"))
                lock(file, wait=True)
                locked = has_its_name(file, path)  # otherwise another rank has replaced it
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
