"""A remote shard as one uninterrupted sequence of bytes, whatever the network does meanwhile.

Interruptions are mended below the decompressor, at the byte where they happened, so that the documents above
go on as if nothing had been. HTTP is spoken here through the standard library rather than through fsspec,
whose HTTP files take a short answer for the end of the file, need range requests, and hold 5 MB each. All
other protocols are fsspec's.
"""

from __future__ import annotations

import http.client
import io
import random
import re
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import IO, Any, NamedTuple, TypeVar

import fsspec

from sltrain_dist.config.schema import DataConfig
from sltrain_dist.errors import DataError

_LONGEST_WAIT_S = 60.0
"""Waits double up to here."""
_LONGEST_RETRY_AFTER_S = 3600.0
"""A server that wants a longer pause than this is not waited for."""
_SKIP_BYTES = 1 << 20
_LASTING = (FileNotFoundError, PermissionError, ImportError, NotImplementedError, TypeError, ValueError)
"""Errors that no second attempt will mend."""
_T = TypeVar("_T")


class Cause(Enum):
    """Why a read was tried again."""

    TIMEOUT = "timeout"
    """No answer in time, or status 408."""
    CONNECTION = "connection"
    """Refused, reset or otherwise failed."""
    RATE_LIMIT = "rate_limit"
    """Status 429."""
    SERVER_ERROR = "server_error"
    """Status 5xx."""
    TRUNCATED = "truncated"
    """The answer ended before the length that it announced."""


class TruncatedError(OSError):
    """An answer that ended too soon."""


@dataclass(frozen=True)
class RetryPolicy:
    """How patient to be with the network; the fields are the configuration's `data.retry…`."""

    retries: int = 8
    """Attempts after the first without any progress between them, before giving up."""
    wait_s: float = 1.0
    """Mean wait before the first of them; it doubles each time, up to a minute."""
    timeout_s: float = 60.0
    """Longest silence of an HTTP server."""

    @classmethod
    def of(cls, data: DataConfig) -> RetryPolicy:
        """The policy of a configuration."""
        return cls(data.retries, data.retry_wait_s, data.timeout_s)


class Fetcher:
    """Decides whether and when to try again, and counts.

    Args:
        policy: How often and after what waits.
        sleep: Waits for some seconds.
        jitter: A random number in [0, 1), so that the ranks of a job do not all come back at once. Has no
            influence on what is read.
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        sleep: Callable[[float], object] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.policy = policy or RetryPolicy()
        self.retries: Counter[Cause] = Counter()
        """Attempts after the first, by cause."""
        self._sleep = sleep
        self._jitter = jitter

    def pause(self, url: str, failures: int, error: Exception) -> None:
        """Waits before the next attempt after `failures` (at least 1) failed ones.

        Raises:
            DataError: There have been too many.
            Exception: `error`, if it is not one that passes.
        """
        cause = cause_of(error)
        if cause is None:
            raise error
        wanted_s = _retry_after_s(error)
        if failures > self.policy.retries or wanted_s > _LONGEST_RETRY_AFTER_S:
            given_up = (
                f"after {failures} attempts" if failures > self.policy.retries else f"(asked for {wanted_s:.0f} s)"
            )
            raise DataError(
                f"cannot read {url}: gave up {given_up}, at last because of {cause.value}: "
                f"{type(error).__name__}: {error}. Start again when the server answers, or raise data.retries"
            ) from error
        self.retries[cause] += 1
        wait_s = min(self.policy.wait_s * 2.0 ** (failures - 1), _LONGEST_WAIT_S) * (0.5 + self._jitter())
        self._sleep(max(wait_s, wanted_s))

    def call(self, url: str, function: Callable[[], _T]) -> _T:
        """The result of a function that asks a server about `url`. Raises as :meth:`pause` does."""
        failures = 0
        while True:
            try:
                return function()
            # Any file system's plug-in may be at work here, each with exceptions of its own.
            except Exception as error:
                failures += 1
                self.pause(url, failures, error)


def cause_of(error: Exception) -> Cause | None:
    """Why to try again after an error; None if that would be useless."""
    status = _status(error)
    if status is not None:
        if status == http.client.REQUEST_TIMEOUT:
            return Cause.TIMEOUT
        if status == http.client.TOO_MANY_REQUESTS:
            return Cause.RATE_LIMIT
        return Cause.SERVER_ERROR if status >= http.client.INTERNAL_SERVER_ERROR else None
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return cause_of(error.reason)
    if isinstance(error, (TruncatedError, http.client.IncompleteRead)):
        return Cause.TRUNCATED
    if isinstance(error, (DataError, *_LASTING, ssl.SSLCertVerificationError, http.client.InvalidURL)):
        return None
    if isinstance(error, TimeoutError) or "timeout" in type(error).__name__.lower():
        return Cause.TIMEOUT
    return Cause.CONNECTION


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


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of any of the usual libraries carries."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


def _retry_after_s(error: Exception) -> float:
    """The pause that the server asks for (RFC 9110, section 10.2.3: seconds or a date); 0 if none."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None)
    value = headers.get("Retry-After") if headers is not None else None
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
