"""`run_dir/exit.json`: how the run ended. Launchers lose exit codes; this file does not."""

from __future__ import annotations

import errno
import json
import os
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
_FITS = 300
"""Characters of a reason that fit into the smallest block of a disk, whatever they are."""
_MISNAMED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP)
"""What a directory says that no run could ever write to, rather than one whose disk is full or failing."""

_held: dict[Path, int] = {}
"""Locked run directories of this process. The system drops the locks when the process ends, however it does."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: Exit code.
        reason: One sentence for a person.
        step: Updates made.
    """

    code: ExitCode
    reason: str
    step: int


def directory(config: Config) -> Path:
    """Where a run writes, exit.json included."""
    return Path(config.run_dir) / "dry_run" if config.train.dry_run else Path(config.run_dir)


def claim(run_dir: Path) -> None:
    """Makes the run directory, takes it for one run, and writes that this run is going on.

    If exit.json still says so when no process holds the directory, the run was killed.

    Raises:
        ConfigError: It cannot be a run directory, or another run is using it.
        StorageError: It cannot be written to, as on a full disk.
    """
    try:
        make_directory(run_dir)
        if not _lock(run_dir):
            raise ConfigError(f"run_dir = {run_dir} is in use by another run; wait for its end, or choose another")
        for leftover in run_dir.glob(f".*{TEMPORARY}"):  # of processes that were killed as they wrote a file
            leftover.unlink(missing_ok=True)
        _write(run_dir, {"code": None, "reason": "running, or killed before it could say why", "step": None})
    except OSError as error:
        if error.errno in _MISNAMED:
            raise ConfigError(f"run_dir = {run_dir} cannot be written to ({error.strerror}); choose another") from None
        raise StorageError(storage_message(f"run_dir = {run_dir}", error)) from None


def write_outcome(run_dir: Path, outcome: Outcome) -> str | None:
    """Says how the run ended, unless another rank has said it first: its peers only lost their connection.

    Returns:
        What another rank gave as the reason, or None if this one's was written.
    """
    with _alone(run_dir / EXIT):
        present = _read(run_dir)
        if present.get("code") is not None:  # claim() has taken away what earlier runs said
            return str(present.get("reason"))
        _write(run_dir, {"code": int(outcome.code), "reason": outcome.reason, "step": outcome.step})
        return None


def write_failed_start(run_dir: Path, outcome: Outcome) -> None:
    """Says that a run could not begin, unless another one is going on in the directory."""
    if run_dir.is_dir() and _lock(run_dir):
        try:
            _write(run_dir, {"code": int(outcome.code), "reason": outcome.reason, "step": outcome.step})
        finally:
            release(run_dir)


def release(run_dir: Path) -> None:
    """Lets other runs use the directory."""
    descriptor = _held.pop(run_dir.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other ranks from reading and replacing a file at the same time, where the file system can lock."""
    with ExitStack() as stack:
        with suppress(OSError):
            locked = False
            while not locked:
                file = stack.enter_context(path.open("r+b"))
                lock(file, wait=True)
                locked = has_its_name(file, path)  # else another rank has replaced it in the meantime
        yield


def _lock(run_dir: Path) -> bool:
    if run_dir.resolve() in _held:
        return False
    descriptor = os.open(run_dir, os.O_RDONLY)
    if not lock(descriptor):
        os.close(descriptor)
        return False
    _held[run_dir.resolve()] = descriptor
    return True


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        values = json.loads((run_dir / EXIT).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(run_dir: Path, values: dict[str, object]) -> None:
    """Replaces exit.json. On a full disk it is overwritten in place, in the block that it has already."""
    values = {**values, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        write_whole(run_dir / EXIT, json.dumps(values) + "\n")
    except OSError as error:
        if error.errno not in NO_SPACE or not (run_dir / EXIT).exists():
            raise
        fits = json.dumps({**values, "reason": str(values["reason"])[:_FITS]}) + "\n"
        with (run_dir / EXIT).open("r+b") as file:
            file.write(fits.encode())
            file.truncate()
        sync_path(run_dir / EXIT)
