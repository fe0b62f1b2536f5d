"""Reading compressed files as the formats' own tools do.

The standard library's readers differ from these: `gzip` refuses a file with garbage at its end, which gzip reads;
`lzma` refuses the padding that xz allows, and takes garbage for the end of the file, which xz refuses.
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
"""Compressed bytes that are read at a time."""
_BUFFER_BYTES = 1 << 17
_GZIP_FORMAT = 16 + zlib.MAX_WBITS
_MAGIC_BYTES = 10
"""Most bytes that tell whether another stream follows."""
_log = logging.getLogger(__name__)


class _GzipDecompressor:
    """Decompresses one stream, with its checksum, in the manner of `bz2`, `lzma` and `zstd`."""

    needs_input = True

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(_GZIP_FORMAT)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            content = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        except zlib.error as error:
            raise gzip.BadGzipFile(str(error)) from None
        # With a full answer, more may come without input.
        self.needs_input = not self._zlib.unconsumed_tail and len(content) < max_length
        return content

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def _zstd() -> Any:
    # Here, because only .zst files need it.
    from backports import zstd

    return zstd.ZstdDecompressor()


class _Format(NamedTuple):
    """How streams of a format are decompressed, and what its tool accepts after one."""

    decompressor: Callable[[], Any]
    padding: int
    """Zero bytes may follow in multiples of this number; 0: none may."""
    magic: re.Pattern[bytes] | None
    """How another stream begins; anything else is ignored, with a warning. None: anything else is an error."""


_FORMATS = {
    "gzip": _Format(_GzipDecompressor, 1, re.compile(rb"\x1f(\x8b|$)")),
    "bz2": _Format(bz2.BZ2Decompressor, 0, re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")),
    "xz": _Format(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 4, None),
    "zstd": _Format(_zstd, 0, None),
}


def decompressed(file: IO[bytes], codec: str, name: str) -> io.BufferedReader:
    """The content of a compressed file of one or several streams.

    Memory is bounded, whatever the compression ratio. (zstd: by 128 MiB, as zstd itself without --long.)

    Args:
        file: The compressed bytes.
        codec: gzip, bz2, xz or zstd.
        name: What the file is called, for warnings.

    Raises:
        EOFError: On reading: the file is truncated, or empty.
        Exception: On reading: the codec's own error; the file is damaged, or of another format.
    """
    return io.BufferedReader(_Reader(file, _FORMATS[codec], name), _BUFFER_BYTES)


@functools.cache  # every stream reads the file, and every epoch
def _warn_of_garbage(name: str) -> None:
    _log.warning("%s: the garbage after its compressed data is ignored", name)


class _Reader(io.RawIOBase):
    def __init__(self, file: IO[bytes], form: _Format, name: str) -> None:
        self._file = file
        self._format = form
        self._name = name
        self._decompressor = form.decompressor()
        self._data = b""  # read, and not yet given to the decompressor
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
                    raise EOFError("the file ends before its compressed data does")
            data, self._data = self._data, b""
            content = self._decompressor.decompress(data, len(view))
            if content:
                view[: len(content)] = content
                return len(content)
        return 0

    def _next_stream(self) -> None:
        """Begins with what follows a stream, if anything does."""
        data = self._decompressor.unused_data or self._file.read(_READ_BYTES)
        if self._format.padding:
            zeros = 0
            while data and not data.strip(b"\0"):
                zeros += len(data)
                data = self._file.read(_READ_BYTES)
            stripped = data.lstrip(b"\0")
            zeros, data = zeros + len(data) - len(stripped), stripped
            if zeros % self._format.padding:
                raise lzma.LZMAError(f"Corrupt input data: {zeros} bytes of padding, which is no multiple of 4")
        while data and len(data) < _MAGIC_BYTES and (more := self._file.read(_READ_BYTES)):
            data += more
        if data and self._format.magic is not None and not self._format.magic.match(data):
            _warn_of_garbage(self._name)
            data = b""
        self._ended = not data
        if data:
            self._decompressor = self._format.decompressor()
            self._data = data
