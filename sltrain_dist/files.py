"""Durable writes (atomic, synced, locked), and checked reads of files that may be damaged."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sltrain_dist.errors import SltrainError, StorageError

T = TypeVar("T", bound=BaseModel)

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 as hexadecimal digits."""
NumBytes = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Size of a file in bytes."""
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]
"""Name of a file inside the directory that lists it: no separator, no leading dot."""

TEMPORARY = ".tmp"
"""Suffix of temporary files, which are renamed once they are complete."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""`errno` values for a full disk or an exhausted quota."""
_INCOMPLETE = ".incomplete"
"""Suffix of temporary directories, which are renamed once they are complete."""
_LEFTOVER_AGE_S = 24 * 3600
"""Age of a temporary directory from which its process is taken to be gone."""
_MAX_MANIFEST_BYTES = 1 << 28


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns any OSError raised within the block into a StorageError.

    Args:
        what: What is being written; the message begins with it. Example: "the model runs/model".
    """
    try:
        yield
    except OSError as error:
        raise StorageError(storage_message(what, error)) from None


def storage_message(what: str, error: OSError) -> str:
    """Returns the message for a failed write: what, why, and what to do about it."""
    return (
        f"{what} cannot be written ({error.strerror or error}); free space or quota, or fix the permissions, "
        "and start the same command again"
    )


@contextmanager
def failing_as(message: str, otherwise: type[SltrainError]) -> Iterator[None]:
    """Turns any OSError raised within the block into a StorageError if the disk or quota is full, else `otherwise`.

    Args:
        message: What cannot be written; the reason is appended.
        otherwise: The error type for every other cause, such as a path that is not writable.
    """
    try:
        yield
    except OSError as error:
        kind = StorageError if error.errno in NO_SPACE else otherwise
        raise kind(f"{message}: {error.strerror or error}") from None


def delete_file(path: Path) -> None:
    """Deletes a partly written regular file, if it exists. Devices and pipes are left alone."""
    with suppress(OSError):
        if path.is_file():
            path.unlink()


def write_synced(path: Path, content: str | bytes) -> None:
    """Writes a file and waits until its content is on disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, see :func:`writing_whole`."""
    with writing_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file to write, which replaces `path` atomically when the block ends; safe against power cuts.

    The content goes to a temporary file with a unique name, which is deleted if the block raises. A replaced file
    keeps its permissions; a new one follows the umask.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        rename_synced(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing_directory(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a directory to fill, which becomes `path` atomically when the block ends; safe against power cuts.

    The files go to a temporary directory beside `path`, which is deleted if the block raises. That of a process that
    was killed is deleted by the next call for the same path.

    Args:
        path: The directory to make. It must not exist, or be empty. Missing parents are made.
        shared: Whether other processes may be making the same directory. Then the first to finish wins, without an
            error for the others, and only temporary directories older than a day count as those of killed processes.

    Raises:
        OSError: The directory cannot be written, or `path` has other content; nothing is left behind.
    """
    make_directory(path.parent)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}{_INCOMPLETE}"):
        with suppress(OSError):
            if not shared or time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_S:
                shutil.rmtree(leftover, ignore_errors=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}{_INCOMPLETE}"
    temporary.mkdir()
    try:
        yield temporary
        for each in (*temporary.rglob("*"), temporary):
            sync_path(each)
        try:
            rename_synced(temporary, path)
        except OSError as error:
            if not (shared and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_synced(old: Path, new: Path) -> Path:
    """Renames a file or directory within its directory, waits until the new name is on disk, and returns it."""
    old.rename(new)
    sync_path(new.parent)
    return new


def lock(file: IO[Any] | int, *, wait: bool = False) -> bool:
    """Locks an open file or directory until it is closed or the process ends.

    Some cluster file systems have no locks. There this returns True for everyone, and excludes nobody.

    Args:
        file: The file, or the descriptor of a directory.
        wait: Whether to wait while another process holds the lock.

    Returns:
        False if another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def has_its_name(file: IO[Any], path: Path) -> bool:
    """Returns whether `path` still names this open file. Writes to a deleted file are lost without an error."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sync_path(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Makes a directory and its missing parents, and waits until their names are on disk."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_path(each.parent)


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading. Devices and pipes are refused: reading one may never end.

    Raises:
        OSError: The file cannot be opened, or is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is not a regular file")
    return path.open("rb")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a regular file, as hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SealedModel(BaseModel):
    """Base class of manifests: strictly typed values with a checksum over them.

    Manifests of older versions of this program have no checksum.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)

    checksum: Sha256 | None = None
    """SHA-256 over all other values, serialized as JSON with sorted keys."""

    def sealed(self) -> str:
        """Returns the manifest as JSON text, with its checksum."""
        values = self.model_dump(mode="json", exclude={"checksum"})
        return json.dumps({**values, "checksum": _checksum(values)}, indent=1, sort_keys=True) + "\n"


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_model(path: Path, model: type[T]) -> T:
    """Parses a JSON file into a pydantic model.

    Raises:
        OSError: The file cannot be read.
        ValueError: The content does not fit the model; the message is one line.
    """
    with open_regular(path) as file:
        content = file.read(_MAX_MANIFEST_BYTES + 1)
    if len(content) > _MAX_MANIFEST_BYTES:
        raise ValueError(f"it has more than {_MAX_MANIFEST_BYTES} bytes")
    return parse_model(content, model)


def parse_model(content: bytes | str, model: type[T]) -> T:
    """Parses JSON text into a pydantic model; raises ValueError as :func:`read_model` does."""
    try:
        parsed = model.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    if isinstance(parsed, SealedModel) and parsed.checksum is not None:
        values = json.loads(content)  # as written: `parsed` also has the defaults of fields that the file lacks
        if values.pop("checksum") != _checksum(values):
            raise ValueError("its checksum does not match its content")
    return parsed


def first_problem(error: ValidationError) -> str:
    """Returns the first validation problem, as one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
