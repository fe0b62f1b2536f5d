"""How anything becomes durable, and how a file that may be damaged is read."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
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
"""A SHA-256 in hexadecimal digits."""
NumBytes = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Size of a file."""
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]
"""Name of a file inside the directory that lists it: no separator, no leading dot."""

TEMPORARY = ".tmp"
"""Suffix of files that are being written."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk or a quota is full."""
_LARGEST_MANIFEST = 1 << 28


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns a failed write within the block into a StorageError.

    Args:
        what: What is written, as the message's first words, such as "the model runs/model".
    """
    try:
        yield
    except OSError as error:
        raise StorageError(storage_message(what, error)) from None


def storage_message(what: str, error: OSError) -> str:
    """What cannot be written, why, and what to do about it."""
    return (
        f"{what} cannot be written ({error.strerror or error}); free space or quota, or mend the permissions, "
        "and start the same command again"
    )


def write_error(message: str, error: OSError, otherwise: type[SltrainError]) -> SltrainError:
    """The error to raise for a failed write: StorageError on a full disk, and else what the command's user has to mend.

    Args:
        message: What cannot be written; the reason is added.
        error: What the system said.
        otherwise: The error for a path that cannot be written at all.
    """
    kind = StorageError if error.errno in NO_SPACE else otherwise
    return kind(f"{message}: {error.strerror or error}")


def delete_file(path: Path) -> None:
    """Deletes a regular file that could not be written to its end, if there is one. Devices and pipes stay."""
    with suppress(OSError):
        if path.is_file():
            path.unlink()


def write_synced(path: Path, content: str | bytes) -> None:
    """Writes a file and waits until its content is on the disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: str | bytes) -> None:
    """As :func:`writing_whole`, with all of the content at once."""
    with writing_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that is whole under its name when the block ends, or is what it was before, also after a power cut.

    Until then it has another name, which no other process uses. A file that is replaced passes its permissions on; a
    new one follows the umask.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def lock(file: IO[Any] | int, *, wait: bool = False) -> bool:
    """Locks an open file or directory until it is closed, or the process ends.

    Some cluster file systems have no locks; there, two processes at a time go unnoticed.

    Args:
        file: The file, or the descriptor of a directory.
        wait: Whether to wait while another process holds it.

    Returns:
        False if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def has_its_name(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still what `path` names: what is written to a deleted file is lost without a word."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sync_path(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Makes a directory and those above it, and waits until their names are on the disk."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_path(each.parent)


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading. A device or a pipe could deliver bytes, or keep one waiting, for ever.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is not a regular file")
    return path.open("rb")


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SealedModel(BaseModel):
    """What a manifest holds: strictly typed, with a checksum of its own.

    A manifest without a checksum is of an older version of this program.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)

    checksum: Sha256 | None = None
    """SHA-256 over all other values, as JSON with sorted keys."""

    def sealed(self) -> str:
        """The manifest's file, with its checksum."""
        values = self.model_dump(mode="json", exclude={"checksum"})
        return json.dumps({**values, "checksum": _checksum(values)}, indent=1, sort_keys=True) + "\n"


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_model(path: Path, model: type[T]) -> T:
    """Parses a JSON file into a pydantic model.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not what the model asks for; the message is one line.
    """
    with open_regular(path) as file:
        content = file.read(_LARGEST_MANIFEST + 1)
    if len(content) > _LARGEST_MANIFEST:
        raise ValueError(f"it has more than {_LARGEST_MANIFEST} bytes")
    return parse_model(content, model)


def parse_model(content: bytes | str, model: type[T]) -> T:
    """As :func:`read_model`, of a file's content."""
    try:
        parsed = model.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    if isinstance(parsed, SealedModel) and parsed.checksum is not None:
        values = json.loads(content)  # as written: a later version may know fields that were not there yet
        if values.pop("checksum") != _checksum(values):
            raise ValueError("its checksum is not that of its content")
    return parsed


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
