"""Documents, and how they are read from a user's files of text, JSON lines and tables."""

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
    """Where it came from: without absolute paths, so that a corpus does not depend on the machine."""
    source: str
    """What the manifest counts it under: a Python package, or a file."""


@dataclass(frozen=True)
class InputOptions:
    """How files are read."""

    txt_unit: TxtUnit = "file"
    """What a document is in a text file: the whole file, or the lines between two blank lines."""
    text_field: str = "text"
    """Key of the text in each JSON line, or column of a table. In JSON, a string under `url` is kept."""
    encoding: str | None = None
    """Encoding of text and JSON lines. None: UTF-8, or UTF-16 or UTF-32 where a file's beginning says so."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Longer documents are an error."""

    def __post_init__(self) -> None:
        """Raises ConfigError if there is no such encoding."""
        try:
            if self.encoding is not None:
                codecs.getincrementaldecoder(self.encoding)()
                "a".encode(self.encoding)  # which codecs for other things than text refuse
        except (LookupError, ValueError):
            raise ConfigError(
                f"--encoding {self.encoding}: Python knows no such encoding of text; utf-8, utf-16, latin-1 and cp1252 "
                "are some"
            ) from None


def find_inputs(patterns: Sequence[str], report: Report = lambda line: None) -> list[str]:
    """The files that the patterns name, as `data.source` names them, and plain text; sorted, each once.

    Raises:
        DataError: A pattern matches nothing.
        ConfigError: A file is of an unknown kind, or of token shards.
    """
    shards = resolve_source(list(patterns), key="--input", report=report, with_text=True)
    for shard in shards:
        if base_name(shard) == "token_shards.json":
            raise ConfigError(f"--input {shard} is of token shards; give the text that they were made of")
        if kind_of(shard) not in {Kind.PLAIN_TEXT, *DOCUMENTS}:
            raise ConfigError(
                f"--input {shard}: unknown kind of file; text files end in .txt, .text or .md, JSON lines in .json, "
                ".jsonl or .ndjson, each also with .gz, .bz2, .xz or .zst; tables in .parquet or .arrow"
            )
    return shards


def read_documents(shard: str, options: InputOptions | None = None) -> Iterator[Document]:
    """The documents of a file.

    Args:
        shard: One of :func:`find_inputs`'s.
        options: How it is read.

    Raises:
        DataError: The file cannot be read, is not in the encoding, or a line has no text. The message names it.
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
                        f"{printable(shard)} holds NUL characters, so it is not text, or not in "
                        f"{options.encoding or 'UTF-8'}; say what it is with --encoding, such as utf-16-le, or leave "
                        "the file out"
                    )
                yield unit
    except UnicodeError as error:
        why = str(error)
        if isinstance(error, UnicodeDecodeError):  # whose position is that in a piece of the file
            why = f"{error.reason}: byte 0x{error.object[error.start]:02x}"
        raise DataError(
            f"{printable(shard)} is not {options.encoding or 'UTF-8'} text ({why}); say what it is with --encoding, "
            "such as latin-1, cp1252 or utf-16-le, or leave the file out"
        ) from None
    except _TooLongError:
        raise DataError(
            f"{printable(shard)} has a document of more than {options.max_document_bytes:,} bytes; split it, take "
            "--txt-unit paragraph, or raise --max-document-bytes (and data.max_document_bytes in training)"
        ) from None
    # Any file system's plug-in and any decompressor may be at work here, each with exceptions of its own.
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
        text.detach()  # or it would close the file, which is not its own


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
    """The text of one document, and where it says that it comes from; None for a blank line."""
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
        raise DataError(f"{where}: not JSON; one object a line is expected")
    if row is Fault.INVALID_UTF8:
        raise DataError(f"{where}: not UTF-8; say what it is with --encoding, such as latin-1 or cp1252")
    if row is Fault.TOO_LONG:
        raise DataError(
            f"{where}: more than {options.max_document_bytes:,} bytes; take it out, or raise --max-document-bytes (and "
            "data.max_document_bytes in training)"
        )
    if not isinstance(row, dict):
        raise DataError(f"{where}: JSON of the type {type(row).__name__}; one object a line is expected")
    text = row.get(options.text_field)
    if not isinstance(text, str):
        keys = ", ".join(row)
        raise DataError(f"{where}: no text under {options.text_field!r} (there is: {keys}); see --text-field")
    url = row.get("url")
    return _encodable(text), _encodable(url) if isinstance(url, str) else None


def _encodable(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can escape and no UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode()
