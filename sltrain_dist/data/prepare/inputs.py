"""Documents of a corpus, read from a user's files of text, JSON lines and tables."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from sltrain_dist.data.documents import Fault, Record, Text, parse_json
from sltrain_dist.data.sources.directory import Report
from sltrain_dist.data.sources.kinds import DOCUMENTS, MAX_DOCUMENT_BYTES, Kind, base_name, kind_of, printable
from sltrain_dist.data.sources.opening import opened, reading_error
from sltrain_dist.data.sources.resolve import read_documents as read_records
from sltrain_dist.data.sources.resolve import resolve_source
from sltrain_dist.data.sources.retry import Fetcher
from sltrain_dist.errors import ConfigError, DataError

TxtUnit = Literal["file", "paragraph"]


@dataclass(frozen=True, slots=True)
class Document:
    """One document on its way into a corpus."""

    text: str
    url: str
    """Origin of the document, without absolute paths, so that a corpus does not depend on the machine."""
    source: str
    """Name that the manifest counts the document under: a Python package or a file."""


@dataclass(frozen=True)
class InputOptions:
    """Options for reading files."""

    txt_unit: TxtUnit = "file"
    """What one document of a text file is: the whole file, or the lines between two blank lines."""
    text_field: str = "text"
    """Key of the text in each JSON line, or column of a table. A string under `url` in JSON is kept."""
    encoding: str | None = None
    """Encoding of text and JSON lines. None: UTF-8, or UTF-16 or UTF-32 if a file's first bytes show it."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Longer documents are an error."""

    def __post_init__(self) -> None:
        """Raises ConfigError if the encoding is unknown."""
        try:
            if self.encoding is not None:
                codecs.getincrementaldecoder(self.encoding)()
                "a".encode(self.encoding)  # codecs that are not for text refuse this
        except (LookupError, ValueError):
            raise ConfigError(
                f"--encoding {self.encoding}: not a text encoding that Python knows; use one such as utf-8, utf-16, "
                "latin-1 or cp1252"
            ) from None


def find_inputs(patterns: Sequence[str], report: Report = lambda line: None) -> list[str]:
    """Returns the files that match the patterns, sorted, without duplicates.

    Patterns are entries as in `data.source`; plain text is accepted too.

    Raises:
        DataError: A pattern matches nothing.
        ConfigError: A file is of an unknown kind, or belongs to token shards.
    """
    shards = resolve_source(list(patterns), key="--input", report=report, with_text=True)
    for shard in shards:
        if base_name(shard) == "token_shards.json":
            raise ConfigError(f"--input {shard} belongs to token shards; give the text that they were made from")
        if kind_of(shard) not in {Kind.PLAIN_TEXT, *DOCUMENTS}:
            raise ConfigError(
                f"--input {shard}: unknown kind of file; text files end in .txt, .text or .md, JSON lines in .json, "
                ".jsonl or .ndjson, each also with .gz, .bz2, .xz or .zst; tables in .parquet or .arrow"
            )
    return shards


def read_documents(shard: str, options: InputOptions | None = None) -> Iterator[Document]:
    """Yields the documents of a file.

    Args:
        shard: A file from :func:`find_inputs`.
        options: How to read it.

    Raises:
        DataError: The file cannot be read, is not in the encoding, or has a line without text. The message names it.
    """
    options = options or InputOptions()
    name = printable(base_name(shard))
    if kind_of(shard) is Kind.PLAIN_TEXT:
        for number, text in enumerate(_texts(shard, options)):
            yield Document(text, f"file:{name}#{number}", name)
        return
    records = read_records(shard, options.text_field, max_bytes=options.max_document_bytes, encoding=options.encoding)
    for index, record in records:
        found = _text_and_url(record, f"{name}, line {index + 1}", options)
        if found is not None:
            yield Document(found[0], found[1] or f"file:{name}#{index}", name)


def _texts(shard: str, options: InputOptions) -> Iterator[str]:
    try:
        with opened(shard, Fetcher(), encoding=options.encoding) as file, _as_text(file) as text:
            units = _paragraphs(text, options) if options.txt_unit == "paragraph" else _whole(text, options)
            for unit in units:
                if "\0" in unit:
                    raise DataError(
                        f"{printable(shard)} contains NUL characters, so it is not text, or not in "
                        f"{options.encoding or 'UTF-8'}; set --encoding, such as to utf-16-le, or leave the file out"
                    )
                yield unit
    except UnicodeError as error:
        why = str(error)
        if isinstance(error, UnicodeDecodeError):  # its position is relative to a piece of the file
            why = f"{error.reason}: byte 0x{error.object[error.start]:02x}"
        raise DataError(
            f"{printable(shard)} is not {options.encoding or 'UTF-8'} text ({why}); set --encoding, "
            "such as to latin-1, cp1252 or utf-16-le, or leave the file out"
        ) from None
    except _TooLongError:
        raise DataError(
            f"{printable(shard)} has a document of more than {options.max_document_bytes:,} bytes; split it, use "
            "--txt-unit paragraph, or raise --max-document-bytes (and data.max_document_bytes in training)"
        ) from None
    # Plug-ins of file systems and decompressors raise exceptions of any type.
    except Exception as error:
        raise reading_error(shard, 0, error) from error


class _TooLongError(Exception):
    """A document has more bytes than accepted."""


@contextmanager
def _as_text(file: io.BufferedReader) -> Iterator[io.TextIOWrapper]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    try:
        yield text
    finally:
        text.detach()  # its destructor would close the caller's file


def _whole(file: io.TextIOWrapper, options: InputOptions) -> Iterator[str]:
    text = file.read(options.max_document_bytes + 1)
    if len(text.encode()) > options.max_document_bytes:
        raise _TooLongError
    yield text


def _paragraphs(file: io.TextIOWrapper, options: InputOptions) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    while line := file.readline(options.max_document_bytes + 1):
        if line.strip():
            lines.append(line)
            size += len(line.encode())
            if size > options.max_document_bytes:
                raise _TooLongError
        elif lines:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _text_and_url(record: Record, where: str, options: InputOptions) -> tuple[str, str | None] | None:
    """Returns the text of one document and its URL, if it has one; None for a blank line."""
    if isinstance(record, Text):
        try:
            return record.decode(), None
        except UnicodeDecodeError:
            record = Fault.INVALID_UTF8
    if record is Fault.NO_TEXT:  # a row of a table without a value
        return "", None
    row: Any = record if isinstance(record, Fault) else parse_json(record)
    if row is Fault.EMPTY:
        return None
    if row is Fault.NOT_JSON:
        raise DataError(f"{where}: not JSON; expected one object per line")
    if row is Fault.INVALID_UTF8:
        raise DataError(f"{where}: not UTF-8; set --encoding, such as to latin-1 or cp1252")
    if row is Fault.TOO_LONG:
        raise DataError(
            f"{where}: more than {options.max_document_bytes:,} bytes; remove it, or raise --max-document-bytes (and "
            "data.max_document_bytes in training)"
        )
    if not isinstance(row, dict):
        raise DataError(f"{where}: JSON of type {type(row).__name__}; expected one object per line")
    text = row.get(options.text_field)
    if not isinstance(text, str):
        keys = ", ".join(row)
        raise DataError(f"{where}: no text under {options.text_field!r} (its keys: {keys}); check --text-field")
    url = row.get("url")
    return _encodable(text), _encodable(url) if isinstance(url, str) else None


def _encodable(text: str) -> str:
    """Returns the text without halves of surrogate pairs, which JSON can escape but UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()
