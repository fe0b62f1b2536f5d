"""Readers of compressed files that accept and refuse the same files as the formats' own tools.

The standard library's readers differ: `gzip` refuses trailing garbage, which the gzip tool ignores; `lzma` refuses the
padding that the xz tool allows, and takes trailing garbage for the end of the file, which xz refuses.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import logging
import lzma
import re
import zlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple

_READ_BYTES = 1 << 16
"""Compressed bytes read at a time."""
_BUFFER_BYTES = 1 << 17
_GZIP_FORMAT = 16 + zlib.MAX_WBITS
_MAGIC_BYTES = 10
"""Number of bytes that always suffice to tell whether another stream follows."""
_log = logging.getLogger(__name__)


class _GzipDecompressor:
    """Decompressor of one gzip stream, checksum included, with the interface of those of `bz2`, `lzma` and `zstd`."""

    needs_input = True

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(_GZIP_FORMAT)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            content = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        except zlib.error as error:
            raise gzip.BadGzipFile(str(error)) from None
        # If the output is full, more may come without further input.
        self.needs_input = not self._zlib.unconsumed_tail and len(content) < max_length
        return content

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def _zstd() -> Any:
    # Imported here, because only .zst files need it.
    from backports import zstd

    return zstd.ZstdDecompressor()


class _Format(NamedTuple):
    """How to decompress a stream of a format, and what its tool accepts after the stream."""

    decompressor: Callable[[], Any]
    padding: int
    """Zero bytes may follow in multiples of this number; 0: no padding is allowed."""
    magic: re.Pattern[bytes] | None
    """First bytes of a further stream; anything else is ignored with a warning. None: anything else is an error."""


_FORMATS = {
    "gzip": _Format(_GzipDecompressor, 1, re.compile(rb"\x1f(\x8b|$)")),
    "bz2": _Format(bz2.BZ2Decompressor, 0, re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")),
    "xz": _Format(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 4, None),
    "zstd": _Format(_zstd, 0, None),
}


def decompressed(file: IO[bytes], codec: str, name: str) -> io.BufferedReader:
    """Returns a reader of the content of a compressed file of one or several streams.

    Memory is bounded at any compression ratio (zstd: by 128 MiB, as in the zstd tool without --long).

    Args:
        file: The compressed bytes.
        codec: gzip, bz2, xz or zstd.
        name: Name of the file, for warnings.

    Raises:
        EOFError: While reading: the file is truncated or empty.
        Exception: While reading, the codec's own error: the file is damaged or of another format.
    """
    return io.BufferedReader(_Reader(file, _FORMATS[codec], name), _BUFFER_BYTES)


@functools.cache  # once per file, although every stream reads it in every epoch
def _warn_of_garbage(name: str) -> None:
    _log.warning("%s: ignored garbage after the compressed data", name)


class _Reader(io.RawIOBase):
    def __init__(self, file: IO[bytes], form: _Format, name: str) -> None:
        self._file = file
        self._format = form
        self._name = name
        self._decompressor = form.decompressor()
        self._data = b""  # read, but not yet passed to the decompressor
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ended:
            if self._decompressor.eof:
                self._next_stream()
                continue
            if self._decompressor.needs_input and not self._data:
                self._data = self._file.read(_READ_BYTES)
                if not self._data:
                    raise EOFError("the file ends in the middle of its compressed data")
            data, self._data = self._data, b""
            content = self._decompressor.decompress(data, len(view))
            if content:
                view[: len(content)] = content
                return len(content)
        return 0

    def _next_stream(self) -> None:
        """Starts decompressing the next stream of the file, if there is one."""
        data = self._decompressor.unused_data or self._file.read(_READ_BYTES)
        if self._format.padding:
            zeros = 0
            while data and not data.strip(b"\0"):
                zeros += len(data)
                data = self._file.read(_READ_BYTES)
            stripped = data.lstrip(b"\0")
            zeros, data = zeros + len(data) - len(stripped), stripped
            if zeros % self._format.padding:
                raise lzma.LZMAError(f"Corrupt input data: {zeros} bytes of padding, which is not a multiple of 4")
        while data and len(data) < _MAGIC_BYTES and (more := self._file.read(_READ_BYTES)):
            data += more
        if data and self._format.magic is not None and not self._format.magic.match(data):
            _warn_of_garbage(self._name)
            data = b""
        self._ended = not data
        if data:
            self._decompressor = self._format.decompressor()
            self._data = data
