"""Identities of local files, to notice when one changes during a run or before it resumes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sltrain_dist.data.sources.kinds import is_url
from sltrain_dist.errors import DataError

_HASHED_BYTES = 1 << 16
"""Bytes hashed at each end of a file: hashing whole files would read all data at every start."""
CONTENT_DIGITS = 8
UNKNOWN = "-" * CONTENT_DIGITS
"""Stands for the content of a file that is not local."""


class FileIdentity(NamedTuple):
    """Size, partial hash and status of a local file."""

    size: int
    """In bytes."""
    content: str
    """Hash of the size and both ends of the file, as hexadecimal digits; equal for copies on other hosts."""
    status: tuple[int, ...]
    """Values of `stat`: they change with every change of the file on this host, and sometimes without one."""


def identify(paths: Iterable[str]) -> dict[str, FileIdentity]:
    """Returns the identities of the paths that are local files."""
    return {path: _identity(path) for path in paths if not is_url(path) and Path(path).is_file()}


def check_unchanged(path: str, expected: FileIdentity | None, descriptor: int | None = None) -> None:
    """Checks that a file is unchanged. Its content is read only if its status has changed.

    Args:
        path: The file.
        expected: The identity to compare with; None: no check.
        descriptor: The open file to check, in case `path` names another file by now.

    Raises:
        DataError: The file has changed or is missing.
    """
    if expected is None:
        return
    try:
        if _status(os.stat(path if descriptor is None else descriptor)) == expected.status:  # noqa: PTH116
            return
        found = _identity(path if descriptor is None else descriptor)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist any more; restore it, or correct the source") from None
    if found.content != expected.content:
        raise DataError(
            f"{path} has changed since the run began: {found.size:,} bytes, content {found.content}, instead of "
            f"{expected.size:,} bytes, content {expected.content}. Restore the file, or start a new run "
            "(another run_dir)"
        )


def _identity(path: str | int) -> FileIdentity:
    with open(path, "rb", closefd=isinstance(path, str), buffering=0) as file:
        descriptor = file.fileno()
        before = os.fstat(descriptor)
        digest = hashlib.sha256(str(before.st_size).encode())
        digest.update(os.pread(descriptor, _HASHED_BYTES, 0))
        tail = max(_HASHED_BYTES, before.st_size - _HASHED_BYTES)
        digest.update(os.pread(descriptor, _HASHED_BYTES, tail))
        return FileIdentity(before.st_size, digest.hexdigest()[:CONTENT_DIGITS], _status(before))


def _status(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
