"""The file metrics.jsonl: one JSON object per line. A resumed run looks like an uninterrupted one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sltrain_dist.errors import DataError
from sltrain_dist.files import has_its_name, make_directory, sync_path, write_whole

Json = float | int | str | None | Sequence[Mapping[str, str]]
"""A value of a line."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a metrics.jsonl, parsed. A line that a run is writing may be incomplete.

    Raises:
        DataError: A line is damaged.
        FileNotFoundError: There is no such file.
    """
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error})") from None


class JsonLines:
    """Appends records to a file of JSON lines; each line is written with one system call.

    Values that are not finite become the strings "NaN", "Infinity" and "-Infinity" (as in protobuf's JSON
    mapping): JSON has no such numbers, null would not distinguish them, and `float()` reads the strings back.

    Args:
        path: The file. Made if it does not exist.
        resumed_step: The update after which the run resumes. Lines of later updates are dropped, as these updates are
            repeated, and so is an incomplete line of a killed process. 0: a new run; all lines are dropped.
        warn: Called if the file is deleted or replaced during the run: the lines so far are then lost, and later lines
            go to a new file.

    Attributes:
        path: The file.

    Raises:
        OSError: The file cannot be read or written.
    """

    def __init__(self, path: Path, resumed_step: int = 0, warn: Callable[[str], None] = print) -> None:
        self.path, self._warn = path, warn
        if path.exists():
            _drop_after(path, resumed_step)
        self._open()

    def write(self, record: Mapping[str, Json]) -> None:
        """Appends one record.

        Args:
            record: The values, with the number of their update as `step`.

        Raises:
            OSError: The line could not be written; no part of it stays in the file.
        """
        assert isinstance(record.get("step"), int), "a record without a step could not be dropped on resume"
        if not has_its_name(self._file, self.path):
            self._file.close()
            self._open()
            self._warn(f"{self.path} has been deleted or replaced: its lines before update {record['step']} are lost")
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self.path}: only a part of the line was written; is the disk full?")
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def holds(self, step: int, key: str) -> bool:
        """Returns whether there is a record of this update with this key."""
        records = map(json.loads, self.path.read_bytes().splitlines())
        return any(record["step"] == step and key in record for record in records)

    def go_back(self, step: int) -> None:
        """Drops the lines of updates after `step`, as these updates are repeated.

        Raises:
            OSError: The file cannot be read or written.
        """
        self._file.close()
        try:
            _drop_after(self.path, step)
        finally:
            self._open()

    def sync(self) -> None:
        """Waits until all lines are on disk.

        Raises:
            OSError: Lines cannot be written.
        """
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Waits until all lines are on disk, and closes the file. May be called twice.

        Raises:
            OSError: Lines cannot be written.
        """
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def _open(self) -> None:
        make_directory(self.path.parent)
        self._file = self.path.open("ab", buffering=0)
        sync_path(self.path.parent)


def _finite(value: Json) -> Json:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_after(path: Path, step: int) -> None:
    """Rewrites the file atomically, without incomplete lines and lines of updates after `step`."""
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
