"""Opening a shard: local or remote, compressed or not, in whatever Unicode encoding; and naming what goes wrong."""

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
"""Bytes that are asked of a connection at once."""
_BEGINNINGS = {
    "gzip": (rb"\x1f\x8b", "let its name end in .gz"),
    "bz2": (rb"BZh[1-9]1AY&SY", "let its name end in .bz2"),
    "xz": (rb"\xfd7zXZ\0", "let its name end in .xz"),
    "zstd": (rb"\x28\xb5\x2f\xfd", "let its name end in .zst"),
    "Parquet": (rb"PAR1\x15", "let its name end in .parquet"),
    "Arrow": (rb"ARROW1\0\0", "let its name end in .arrow"),
    "zip": (rb"PK\x03\x04", "unpack it"),
}
"""How files begin that are not text, and what to do with one whose name does not say what it is."""
_LONGEST_BEGINNING = 10


@contextmanager
def opened(
    shard: str, fetcher: Fetcher, *, expected: FileIdentity | None = None, encoding: str | None = None
) -> Iterator[io.BufferedReader]:
    """Opens a shard: a table as it is, anything else decompressed and in UTF-8.

    Args:
        shard: A path or URL.
        fetcher: Decides about failures to read a URL.
        expected: What a local file should be, now and when it has been read.
        encoding: The encoding of the text. None: UTF-16 and UTF-32 are recognised, everything else is left as it is.

    Raises:
        DataError: The file is not the expected one.
        Exception: Here or on reading: the file system's or the decompressor's, see :func:`reading_error`.
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
            # A file that was cut short while it was read is no corrupt one.
            check_unchanged(shard, expected, file.fileno())
            raise
        check_unchanged(shard, expected, file.fileno())


def num_bytes(shard: str) -> int | None:
    """Size of a shard's file, or None where the server does not say."""
    if not is_url(shard):
        return Path(shard).stat().st_size
    file_system, path = fsspec.core.url_to_fs(shard)
    size = file_system.size(path)
    return None if size is None else int(size)


def reading_error(shard: str, done: int, error: Exception) -> DataError:
    """The error for a shard that cannot be read.

    Args:
        shard: Its path or URL.
        done: Lines or rows that were read before.
        error: What happened.
    """
    if isinstance(error, DataError):
        return error
    is_table = kind_of(shard) in TABLES
    where = f"after {done} {'rows' if is_table else 'lines'}" if done else "at its start"
    if remedy := remedy_for(error, shard):
        return DataError(f"cannot read the shard {shard}: {describe(error)}; {remedy}")
    if isinstance(error, FileNotFoundError):
        return DataError(f"the shard {shard} is not there (any more); put it back, or correct the source")
    message = f"cannot read the shard {shard} {where}: {describe(error)}"
    if isinstance(error, UnicodeError):
        return DataError(f"{message}. Its text is not in the encoding that its beginning, or --encoding, says")
    if "requires too much memory" in str(error):  # zstd
        return DataError(f"{message}. It was compressed with a window of more than 128 MiB: repeat that without --long")
    if codec_of(shard) is not None or is_table:
        return DataError(f"{message}. A corrupt or truncated file must be fetched again, or taken out of the source")
    return DataError(message)


def remedy_for(error: Exception, url: str) -> str | None:
    """What to install or to check, where the error of a URL tells."""
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
    """An error's type and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _content(file: io.BufferedReader, shard: str, encoding: str | None) -> io.BufferedReader:
    if kind_of(shard) in TABLES:
        return file
    codec = codec_of(shard)
    head = file.peek(_LONGEST_BEGINNING)
    for format_name, (beginning, remedy) in _BEGINNINGS.items():
        if format_name != codec and re.match(beginning, head):
            raise DataError(f"{shard} is a {format_name} file by its content, but not by its name; {remedy}")
    if codec:
        file = decompressed(file, codec, shard)
    encoding = encoding or detect(file.peek(4)[:4])
    return file if encoding is None else as_utf8(file, encoding)
