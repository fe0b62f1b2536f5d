"""Conversion of text in other encodings to UTF-8 while it is read."""

from __future__ import annotations

import codecs
import io
from typing import IO, Any

_READ_BYTES = 1 << 16
_PREFIXES = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"{\0\0\0", "utf-32-le"),
    (b"\0\0\0{", "utf-32-be"),
    (b"{\0", "utf-16-le"),
    (b"\0{", "utf-16-be"),
)
"""First bytes of files, a byte-order mark or the brace of a JSON object, and their encoding. The first match counts."""


def detect(head: bytes) -> str | None:
    """Returns UTF-16 or UTF-32 if a file's first four bytes show it; None: UTF-8 or unknown."""
    return next((encoding for prefix, encoding in _PREFIXES if head.startswith(prefix)), None)


def as_utf8(file: IO[bytes], encoding: str) -> io.BufferedReader:
    """Returns a reader of a file in another encoding that gives its text in UTF-8.

    Raises:
        UnicodeDecodeError: While reading: the text is not in this encoding.
    """
    return io.BufferedReader(_Reader(file, encoding), _READ_BYTES)


class _Reader(io.RawIOBase):
    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._content = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._content and not self._ended:
            data = self._file.read(_READ_BYTES)
            self._ended = not data
            # Some decoders let half of a surrogate pair through; it becomes invalid UTF-8, which is counted later.
            self._content = self._decoder.decode(data, final=self._ended).encode("utf-8", "surrogatepass")
        count = min(len(view), len(self._content))
        view[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
