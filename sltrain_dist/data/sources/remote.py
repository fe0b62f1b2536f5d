"""Remote shards as uninterrupted sequences of bytes, which survive failures of the network.

An interrupted read resumes below the decompressor, at the byte where it stopped, so that the readers of documents
above notice nothing. HTTP goes through the standard library instead of fsspec, whose HTTP files take a short
response for the end of the file, need range requests, and keep 5 MB each in memory. All other protocols go through
fsspec.
"""

from __future__ import annotations

import http.client
import io
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple, TypeVar

import fsspec

from sltrain_dist.data.sources.retry import Fetcher, TruncatedError
from sltrain_dist.errors import DataError

_SKIP_BYTES = 1 << 20
_T = TypeVar("_T")


class _Connection(NamedTuple):
    stream: IO[bytes]
    start: int
    """Offset in the file of the stream's first byte."""
    size: int | None
    """Size of the whole file in bytes, if known."""
    version: str | None
    """The server's tag for the file's content (ETag), if it sends one."""
    marks_end: bool
    """Whether a lost connection raises an error, so that the end of the stream is the end of the file."""


class RemoteFile(io.RawIOBase):
    """A URL as a file, for reading and seeking.

    If the server has no range requests, a retry reads from the beginning again, and checks that the bytes are the same.

    Args:
        url: The file.
        fetcher: Retries failed reads.
        has_end: Whether the reader of this file notices a missing end, as decompressors do.

    Raises:
        DataError: While reading: gave up, or the file has changed since it was first opened.
        Exception: While reading: any other error of the file system, such as FileNotFoundError.
    """

    def __init__(self, url: str, fetcher: Fetcher, *, has_end: bool) -> None:
        self._url = url
        self._fetcher = fetcher
        self._has_end = has_end
        self._connection: _Connection | None = None
        self._identity: tuple[int | None, str | None] | None = None
        self._position = 0
        self._failures = 0
        self._hashed = 0  # number of leading bytes that `_hash` covers
        self._hash = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the offset of the next byte to read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to an offset, as in any file. Offsets from the end need a server that reports the file's size."""
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            size = self._attempt(lambda: self._open().size)
            if size is None:
                raise DataError(f"the server does not report the size of {self._url}; download the file")
            offset += size
        if offset != self._position:
            self._disconnect()
            self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Reads up to `len(buffer)` bytes; returns 0 only at the end of the file."""
        view = memoryview(buffer).cast("B")
        data = self._attempt(lambda: self._read(len(view)))
        if self._hashed == self._position:
            self._hash = zlib.crc32(data, self._hash)
            self._hashed += len(data)
        self._position += len(data)
        self._failures = 0
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Closes the connection."""
        self._disconnect()
        super().close()

    def _attempt(self, function: Callable[[], _T]) -> _T:
        while True:
            try:
                return function()
            except Exception as error:  # fsspec's plug-ins raise errors of any type
                self._disconnect()
                self._failures += 1
                self._fetcher.pause(self._url, self._failures, error)

    def _read(self, count: int) -> bytes:
        size = None if self._identity is None else self._identity[0]
        if size is not None and self._position >= size:
            return b""
        connection = self._open()
        data = connection.stream.read(count)
        if data or connection.size == self._position:
            return data
        if connection.size is not None:
            raise TruncatedError(f"the response ended at byte {self._position} of {connection.size}")
        if not connection.marks_end and not self._has_end:
            raise DataError(
                f"the server does not report the size of {self._url}, so a lost connection would look like its end; "
                "download the file, or compress it"
            )
        return data

    def _open(self) -> _Connection:
        if self._connection is not None:
            return self._connection
        http_url = self._url.startswith(("http://", "https://"))
        connection = (
            _open_http(self._url, self._position, self._fetcher.policy.timeout_s)
            if http_url
            else _open_fsspec(self._url, self._position)
        )
        self._connection = connection  # from here on _disconnect closes it
        identity = (connection.size, connection.version)
        if self._identity is not None and self._identity != identity:
            raise DataError(
                f"{self._url} has changed while it was read: its size and version were {self._identity}, now {identity}"
            )
        self._identity = identity
        if connection.start != self._position:
            self._skip(connection)
        return connection

    def _skip(self, connection: _Connection) -> None:
        """Reads from the beginning of the file up to the position, and checks that the bytes are the same as before."""
        if connection.start != 0 or self._hashed != self._position:
            raise DataError(f"reading {self._url} needs a server with range requests; download it")
        found, done = 0, 0
        while done < self._position:
            data = connection.stream.read(min(_SKIP_BYTES, self._position - done))
            if not data:
                raise TruncatedError(f"the response ended at byte {done} of at least {self._position}")
            found = zlib.crc32(data, found)
            done += len(data)
        if found != self._hash:
            raise DataError(f"{self._url} has changed while it was read: its first {done} bytes now differ")

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.stream.close()


def _open_http(url: str, offset: int, timeout_s: float) -> _Connection:
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (http.client.NOT_FOUND, http.client.GONE):
            raise FileNotFoundError(f"{url}: status {error.code}") from error
        raise
    start, size = 0, response.headers.get("Content-Length")
    if response.status == http.client.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None:
            response.close()
            raise DataError(f"{url}: the server's response to a range request names no range; download the file")
        start, size = int(match[1]), None if match[2] == "*" else match[2]
    chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
    return _Connection(response, start, None if size is None else int(size), response.headers.get("ETag"), chunked)


def _open_fsspec(url: str, offset: int) -> _Connection:
    file_system, path = fsspec.core.url_to_fs(url)
    file = file_system.open(path, "rb")
    start = 0
    if offset and file.seekable():
        start = file.seek(offset)
    size = getattr(file, "size", None)
    # These file systems raise an error when the connection is lost; only over HTTP can that look like an end.
    return _Connection(file, start, size if isinstance(size, int) else None, None, True)
