"""Opening of shards, local or remote, compressed or not, in any Unicode encoding; and messages for reading errors."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fsspec
from fsspec.registry import known_implementations

from sltrain_dist.data.sources.compression import decompressed
from sltrain_dist.data.sources.encoding import as_utf8, detect
from sltrain_dist.data.sources.identity import FileIdentity, check_unchanged
from sltrain_dist.data.sources.kinds import TABLES, Kind, codec_of, is_url, kind_of
from sltrain_dist.data.sources.remote import RemoteFile
from sltrain_dist.data.sources.retry import Fetcher, status_of
from sltrain_dist.errors import DataError

_READ_BYTES = 1 << 18
"""Bytes read from a connection at a time."""
_SIGNATURES = {
    "gzip": (rb"\x1f\x8b", "rename it to end in .gz"),
    "bz2": (rb"BZh[1-9]1AY&SY", "rename it to end in .bz2"),
    "xz": (rb"\xfd7zXZ\0", "rename it to end in .xz"),
    "zstd": (rb"\x28\xb5\x2f\xfd", "rename it to end in .zst"),
    "Parquet": (rb"PAR1\x15", "rename it to end in .parquet"),
    "Arrow": (rb"ARROW1\0\0", "rename it to end in .arrow"),
    "zip": (rb"PK\x03\x04", "unpack it"),
}
"""First bytes of file formats, and what to do with a file whose name does not show its format."""
_MAX_SIGNATURE_BYTES = 10


@contextmanager
def opened(
    shard: str, fetcher: Fetcher, *, expected: FileIdentity | None = None, encoding: str | None = None
) -> Iterator[io.BufferedReader]:
    """Opens a shard: a table as it is, everything else decompressed and converted to UTF-8.

    Args:
        shard: A path or URL.
        fetcher: Retries failed reads of URLs.
        expected: Identity of a local file, checked before and after reading.
        encoding: The encoding of the text. None: UTF-16 and UTF-32 are detected, everything else is left as it is.

    Raises:
        DataError: The file is not the expected one.
        Exception: Here or while reading, errors of the file system or the decompressor, see :func:`reading_error`.
    """
    with ExitStack() as stack:
        if is_url(shard):
            has_end = codec_of(shard) is not None or kind_of(shard) is Kind.PARQUET
            remote = stack.enter_context(RemoteFile(shard, fetcher, has_end=has_end))
            yield _content(stack.enter_context(io.BufferedReader(remote, _READ_BYTES)), shard, encoding)
            return
        file = stack.enter_context(Path(shard).open("rb"))
        check_unchanged(shard, expected, file.fileno())
        try:
            yield _content(file, shard, encoding)
        except Exception:
            # A file that was truncated while it was read is reported as changed, not as corrupt.
            check_unchanged(shard, expected, file.fileno())
            raise
        check_unchanged(shard, expected, file.fileno())


def num_bytes(shard: str) -> int | None:
    """Returns the size of a shard's file, or None if the server does not report it."""
    if not is_url(shard):
        return Path(shard).stat().st_size
    file_system, path = fsspec.core.url_to_fs(shard)
    size = file_system.size(path)
    return None if size is None else int(size)


def reading_error(shard: str, done: int, error: Exception) -> DataError:
    """Returns the error to raise for a shard that cannot be read.

    Args:
        shard: Path or URL of the shard.
        done: Number of lines or rows read before the failure.
        error: The original error.
    """
    if isinstance(error, DataError):
        return error
    is_table = kind_of(shard) in TABLES
    where = f"after {done} {'rows' if is_table else 'lines'}" if done else "at its start"
    if remedy := remedy_for(error, shard):
        return DataError(f"cannot read the shard {shard}: {describe(error)}; {remedy}")
    if isinstance(error, FileNotFoundError):
        return DataError(f"the shard {shard} does not exist; restore it, or correct the source")
    message = f"cannot read the shard {shard} {where}: {describe(error)}"
    if isinstance(error, UnicodeError):
        return DataError(f"{message}. Its text is not in the encoding given by its first bytes or --encoding")
    if "requires too much memory" in str(error):  # zstd
        return DataError(f"{message}. It has a window of more than 128 MiB: compress it again without --long")
    if codec_of(shard) is not None or is_table:
        return DataError(f"{message}. A corrupt or truncated file must be replaced, or removed from the source")
    return DataError(message)


def remedy_for(error: Exception, url: str) -> str | None:
    """Returns what to install or check for an error of a URL; None if the error does not show it."""
    protocol, _, path = url.partition("://")
    if not path:
        return None
    if isinstance(error, ImportError):
        package = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
        return f"pip install {package}"
    if status_of(error) in (401, 403) or isinstance(error, PermissionError):
        return f"check the credentials for {protocol}://"
    return None


def describe(error: Exception) -> str:
    """Returns an error's type and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _content(file: io.BufferedReader, shard: str, encoding: str | None) -> io.BufferedReader:
    if kind_of(shard) in TABLES:
        return file
    codec = codec_of(shard)
    head = file.peek(_MAX_SIGNATURE_BYTES)
    for format_name, (signature, remedy) in _SIGNATURES.items():
        if format_name != codec and re.match(signature, head):
            raise DataError(f"{shard} is a {format_name} file by its content, but not by its name; {remedy}")
    if codec:
        file = decompressed(file, codec, shard)
    encoding = encoding or detect(file.peek(4)[:4])
    return file if encoding is None else as_utf8(file, encoding)
