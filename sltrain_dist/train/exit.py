"""`run_dir/exit.json`, which records how the run ended, because launchers do not preserve exit codes."""

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
)

EXIT = "exit.json"
_MAX_REASON_IN_PLACE = 300
"""Number of characters of a reason that fit into the smallest disk block in any encoding."""
_UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that can never be a run directory, unlike those of a disk that is full or failing."""

_locks: dict[Path, int] = {}
"""File descriptors of the run directories that this process has locked. The system releases them when it ends."""


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


def directory(config: Config) -> Path:
    """Returns the directory that a run writes to, including exit.json."""
    return Path(config.run_dir) / "dry_run" if config.train.dry_run else Path(config.run_dir)


def claim(run_dir: Path) -> None:
    """Creates the run directory, locks it for this run, and writes to exit.json that the run is in progress.

    If exit.json still says so when no process has locked the directory, the run was killed.

    Raises:
        ConfigError: The path cannot be a run directory, or another run is using it.
        StorageError: It cannot be written to, for example because the disk is full.
    """
    try:
        make_directory(run_dir)
        if not _lock(run_dir):
            raise ConfigError(f"run_dir = {run_dir} is in use by another run; wait for its end, or choose another")
        for leftover in run_dir.glob(f".*{TEMPORARY}"):  # of processes that were killed while writing a file
            leftover.unlink(missing_ok=True)
        _write(run_dir, {"code": None, "reason": "running, or killed before it could say why", "step": None})
    except OSError as error:
        if error.errno in _UNUSABLE_PATH:
            raise ConfigError(f"run_dir = {run_dir} cannot be written to ({error.strerror}); choose another") from None
        raise StorageError(storage_message(f"run_dir = {run_dir}", error)) from None


def write_outcome(run_dir: Path, outcome: Outcome) -> str | None:
    """Records how the run ended, unless another rank has done so: later failures are consequences of the first.

    Returns:
        The reason that another rank has recorded, or None if this one was written.
    """
    with _exclusively(run_dir / EXIT):
        present = _read(run_dir)
        if present.get("code") is not None:  # from this run, since claim() has replaced that of earlier runs
            return str(present.get("reason"))
        _write(run_dir, {"code": int(outcome.code), "reason": outcome.reason, "step": outcome.step})
        return None


def write_failed_start(run_dir: Path, outcome: Outcome) -> None:
    """Records that a run could not start, unless another one is in progress in the directory."""
    # A rank that cannot lock the directory ends without a word, and torchrun then ends the rank that writes.
    allowed = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        if run_dir.is_dir() and _lock(run_dir):
            try:
                _write(run_dir, {"code": int(outcome.code), "reason": outcome.reason, "step": outcome.step})
            finally:
                release(run_dir)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, allowed)


def release(run_dir: Path) -> None:
    """Unlocks the run directory for other runs."""
    descriptor = _locks.pop(run_dir.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


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


def _lock(run_dir: Path) -> bool:
    if run_dir.resolve() in _locks:
        return False
    descriptor = os.open(run_dir, os.O_RDONLY)
    if not lock(descriptor):
        os.close(descriptor)
        return False
    _locks[run_dir.resolve()] = descriptor
    return True


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        values = json.loads((run_dir / EXIT).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(run_dir: Path, values: dict[str, object]) -> None:
    """Replaces exit.json. On a full disk it is overwritten in place, in its existing block."""
    values = {**values, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        write_whole(run_dir / EXIT, json.dumps(values) + "\n")
    except OSError as error:
        if error.errno not in NO_SPACE or not (run_dir / EXIT).exists():
            raise
        shortened = json.dumps({**values, "reason": str(values["reason"])[:_MAX_REASON_IN_PLACE]}) + "\n"
        with (run_dir / EXIT).open("r+b") as file:
            file.write(shortened.encode())
            file.truncate()
        sync_path(run_dir / EXIT)
