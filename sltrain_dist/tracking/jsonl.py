"""metrics.jsonl: one JSON object a line, which reads as one uninterrupted run however often it was resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sltrain_dist.files import has_its_name, make_directory, sync_path, write_whole


class JsonLines:
    """Appends records to a file of JSON lines; whole lines only, each handed to the system at once.

    Values that are not finite become the strings "NaN", "Infinity" and "-Infinity" (as in protobuf's JSON
    mapping): JSON has no such numbers, null would hide which of them it was, and `float()` reads them back.

    Args:
        path: The file. Made if it is not there.
        resumed_step: The run goes on after this update: lines of later updates are dropped (they are about
            to be made again), and so is a line that a killed process left unfinished. 0: the run starts
            anew, and nothing is kept.
        warn: Told when the file has been deleted or replaced while it was being written: the lines so far are lost
            then, and those that follow go into a new one.

    Raises:
        OSError: The file cannot be read or written.
    """

    def __init__(self, path: Path, resumed_step: int = 0, warn: Callable[[str], None] = print) -> None:
        self._path, self._warn = path, warn
        if path.exists():
            _drop_after(path, resumed_step)
        self._open()

    def write(self, record: Mapping[str, float | int | str | None]) -> None:
        """Appends one record.

        Args:
            record: Must have `step`, the update that it belongs to.

        Raises:
            OSError: The line could not be written; nothing of it is left in the file.
        """
        assert isinstance(record.get("step"), int), "a record without a step could not be dropped on resume"
        if not has_its_name(self._file, self._path):
            self._file.close()
            self._open()
            self._warn(f"{self._path} has been deleted or replaced: its lines before update {record['step']} are lost")
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self._path}: the line was written in part; is the disk full?")
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def holds(self, step: int, key: str) -> bool:
        """Whether there is a record of this update with this key."""
        records = map(json.loads, self._path.read_bytes().splitlines())
        return any(record["step"] == step and key in record for record in records)

    def sync(self) -> None:
        """Waits until all lines are on the disk.

        Raises:
            OSError: They cannot be written.
        """
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Waits until all lines are on the disk, and closes the file. May be called twice.

        Raises:
            OSError: They cannot be written.
        """
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def _open(self) -> None:
        make_directory(self._path.parent)
        self._file = self._path.open("ab", buffering=0)
        sync_path(self._path.parent)


def _finite(value: float | int | str | None) -> float | int | str | None:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_after(path: Path, step: int) -> None:
    """Rewrites the file without torn lines and without those of updates after `step`, atomically."""
    with path.open("rb") as old:
        kept = [line for line in old if _keep(line, step)]
    if sum(map(len, kept)) == path.stat().st_size:
        return
    write_whole(path, b"".join(kept))


def _keep(line: bytes, step: int) -> bool:
    if step <= 0 or not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step
