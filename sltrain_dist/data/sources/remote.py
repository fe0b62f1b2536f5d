"""A remote shard as one uninterrupted sequence of bytes, whatever the network does meanwhile.

Interruptions are mended below the decompressor, at the byte where they happened, so that the documents above
go on as if nothing had been. HTTP is spoken here through the standard library rather than through fsspec,
whose HTTP files take a short answer for the end of the file, need range requests, and hold 5 MB each. All
other protocols are fsspec's.
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


class _Opened(NamedTuple):
    stream: IO[bytes]
    start: int
    """Offset in the file of the first byte that the stream gives."""
    size: int | None
    """Bytes of the whole file, if known."""
    version: str | None
    """Changes when the file changes, if the server says so."""
    marks_end: bool
    """Whether the end of the stream cannot be mistaken for a cut connection."""


class RemoteFile(io.RawIOBase):
    """The bytes of a URL, for reading and seeking.

    Where the server has no range requests, what was read already is read again, and must be the same.

    Args:
        url: The file.
        fetcher: Decides about failures.
        has_end: Whether its reader notices by itself that the end is missing, as decompressors do.

    Raises:
        DataError: On reading: gave up, or the file has changed since it was opened first.
        Exception: On reading: any other error of the file system, such as FileNotFoundError.
    """

    def __init__(self, url: str, fetcher: Fetcher, *, has_end: bool) -> None:
        self._url = url
        self._fetcher = fetcher
        self._has_end = has_end
        self._opened: _Opened | None = None
        self._identity: tuple[int | None, str | None] | None = None
        self._position = 0
        self._failures = 0
        self._hashed = 0  # bytes from the beginning on that `_hash` covers
        self._hash = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Offset of the next byte to be read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to an offset, as for any file. From the end only where the server says how long the file is."""
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            size = self._attempt(lambda: self._open().size)
            if size is None:
                raise DataError(f"the server does not say how long {self._url} is; download it")
            offset += size
        if offset != self._position:
            self._drop()
            self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Reads up to `len(buffer)` bytes; 0 only at the end of the file."""
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
        self._drop()
        super().close()

    def _attempt(self, function: Callable[[], _T]) -> _T:
        while True:
            try:
                return function()
            except Exception as error:  # any plug-in's, as above
                self._drop()
                self._failures += 1
                self._fetcher.pause(self._url, self._failures, error)

    def _read(self, count: int) -> bytes:
        size = None if self._identity is None else self._identity[0]
        if size is not None and self._position >= size:
            return b""
        opened = self._open()
        data = opened.stream.read(count)
        if data or opened.size == self._position:
            return data
        if opened.size is not None:
            raise TruncatedError(f"the answer ended at byte {self._position} of {opened.size}")
        if not opened.marks_end and not self._has_end:
            raise DataError(
                f"the server does not say how long {self._url} is, so that a cut connection would look like its end; "
                "download it, or compress it"
            )
        return data

    def _open(self) -> _Opened:
        if self._opened is not None:
            return self._opened
        http_url = self._url.startswith(("http://", "https://"))
        opened = (
            _open_http(self._url, self._position, self._fetcher.policy.timeout_s)
            if http_url
            else _open_fsspec(self._url, self._position)
        )
        self._opened = opened  # from here on _drop closes it
        identity = (opened.size, opened.version)
        if self._identity is not None and self._identity != identity:
            raise DataError(
                f"{self._url} has changed while it was read: size and version {self._identity}, now {identity}"
            )
        self._identity = identity
        if opened.start != self._position:
            self._skip(opened)
        return opened

    def _skip(self, opened: _Opened) -> None:
        """Reads up to the position in a stream from the beginning, which must give the bytes that it gave before."""
        if opened.start != 0 or self._hashed != self._position:
            raise DataError(f"reading {self._url} needs a server with range requests; download it")
        found, done = 0, 0
        while done < self._position:
            data = opened.stream.read(min(_SKIP_BYTES, self._position - done))
            if not data:
                raise TruncatedError(f"the answer ended at byte {done} of at least {self._position}")
            found = zlib.crc32(data, found)
            done += len(data)
        if found != self._hash:
            raise DataError(f"{self._url} has changed while it was read: its first {done} bytes are different now")

    def _drop(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.stream.close()


def _open_http(url: str, offset: int, timeout_s: float) -> _Opened:
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
            raise DataError(f"{url}: the server answers a request for a range with no range")
        start, size = int(match[1]), None if match[2] == "*" else match[2]
    chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
    return _Opened(response, start, None if size is None else int(size), response.headers.get("ETag"), chunked)


def _open_fsspec(url: str, offset: int) -> _Opened:
    file_system, path = fsspec.core.url_to_fs(url)
    file = file_system.open(path, "rb")
    start = 0
    if offset and file.seekable():
        start = file.seek(offset)
    size = getattr(file, "size", None)
    # These file systems raise on a cut connection; only over HTTP is there an end that means nothing.
    return _Opened(file, start, size if isinstance(size, int) else None, None, True)
