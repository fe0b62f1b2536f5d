"""From lines to token ids: parsing, the reasons why a document cannot be used, and tokenization."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sltrain_dist.errors import DataError

TokenIds = npt.NDArray[np.int32]

SAMPLE = 1000
"""Number of documents that is enough to estimate the share of unusable ones in a source."""
_CHUNK_DOCUMENTS = 64
_CHUNK_BYTES = 1 << 20
"""Documents are tokenized in chunks, for speed; the bounds let the first row come soon."""
_CHARS_PER_TOKEN = 8
_JSON = json.JSONDecoder(parse_int=float)
"""Parses integers as floats: JSON allows any number of digits, int() at most 4300. No number is used here."""


class Fault(Enum):
    """Why a document cannot be used."""

    NOT_JSON = "not_json"
    """The line is not JSON."""
    NO_TEXT = "no_text"
    """The text field is missing or is not a string."""
    INVALID_UTF8 = "invalid_utf8"
    """The line is not UTF-8, or its text has characters that UTF-8 cannot encode (lone surrogates)."""
    EMPTY = "empty"
    """The line or its text is blank, or the tokenizer gives no tokens for it."""
    TOO_LONG = "too_long"
    """The line, or the text in a table, is longer than `data.max_document_bytes`."""


@dataclass
class Tally:
    """Number of documents read, and of those that cannot be used."""

    documents: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
    example: tuple[str, int, Fault] | None = None
    """Shard, line index and fault of one unusable document."""

    def add(self, shard: str, line: int, result: object) -> None:
        """Counts one document, as unusable if `result` is a :class:`Fault`."""
        self.documents += 1
        if isinstance(result, Fault):
            self.faults[result] += 1
            self.example = self.example or (shard, line, result)

    def exceeds(self, max_bad_fraction: float) -> bool:
        """Returns whether the share of unusable documents is larger than accepted."""
        return sum(self.faults.values()) > max_bad_fraction * self.documents

    def error(self, where: str, max_bad_fraction: float, text_field: str) -> DataError:
        """Returns the error for too many unusable documents; `where` says what was read."""
        causes = ", ".join(f"{fault.value}: {count}" for fault, count in self.faults.items() if count)
        example = ""
        if self.example is not None:
            shard, line, fault = self.example
            example = f"; for example line {line + 1} of {shard} ({fault.value})"
        remedies = ["Repair or leave out the file", f"check data.text_field={text_field!r}"]
        if self.faults[Fault.NOT_JSON] == self.documents:
            remedies[1] = "write one JSON object per line; `sltrain prepare-text` converts plain text"
        elif self.faults[Fault.INVALID_UTF8] == self.documents:
            remedies[1] = "convert it to UTF-8, for example with `sltrain prepare-text --encoding latin-1`"
        elif self.faults[Fault.NO_TEXT] == self.documents:
            remedies[1] += " and that each line is one JSON object"
        if self.faults[Fault.TOO_LONG]:
            remedies.append("raise data.max_document_bytes")
        return DataError(
            f"{where}: {sum(self.faults.values())} of {self.documents} documents cannot be used ({causes}), more than "
            f"data.max_bad_fraction={max_bad_fraction} allows{example}. {', '.join(remedies)}, or raise "
            "data.max_bad_fraction"
        )


class Text(bytes):
    """A document's text in UTF-8, from a column of a table."""


Record = bytes | Fault
"""An unparsed document: a :class:`Text` of a table, a JSON line (other bytes), or why it could not be read."""


class Encoder(Protocol):
    """The part of :class:`sltrain_dist.data.tokenizer.Tokenizer` that this package uses."""

    eos_id: int
    fingerprint: str

    @property
    def breaks_at_spaces(self) -> bool:
        """Whether cutting a text before a space always gives a prefix of the whole text's tokens."""

    def encode(self, texts: list[str]) -> list[TokenIds]:
        """Returns the ids of each text, without special tokens."""


def parse(record: Record, text_field: str) -> str | Fault:
    """Returns the text of one document, or why it has none."""
    if isinstance(record, Fault):
        return record
    if isinstance(record, Text):
        try:
            decoded = record.decode()
        except UnicodeDecodeError:
            return Fault.INVALID_UTF8
        return decoded if decoded.strip() else Fault.EMPTY
    content = parse_json(record)
    if isinstance(content, Fault):
        return content
    text = content.get(text_field) if isinstance(content, dict) else None
    if not isinstance(text, str):
        return Fault.NO_TEXT
    if not text.strip():
        return Fault.EMPTY
    # JSON escapes can spell half of a surrogate pair, which neither UTF-8 nor the tokenizer can encode.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Fault.INVALID_UTF8
    return text


def parse_json(line: bytes) -> Any:
    """Returns the value of a JSON line, or the :class:`Fault` that prevents parsing it.

    A byte-order mark is ignored: files begin with one, and so do later lines of concatenated files.
    """
    try:
        decoded = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Fault.INVALID_UTF8
    if not decoded.strip():
        return Fault.EMPTY
    try:
        return _JSON.decode(decoded)
    except (ValueError, RecursionError):
        return Fault.NOT_JSON


def encode_documents(
    records: Iterable[tuple[int, Record]], tokenizer: Encoder, text_field: str, max_tokens: int | None
) -> Iterator[tuple[int, TokenIds | Fault]]:
    """Yields the index and the token ids of each document, in the order given.

    Args:
        records: Documents and their indices, as :func:`sltrain_dist.data.sources.resolve.read_documents` yields them.
        tokenizer: The tokenizer.
        text_field: Key of the text in each JSON object.
        max_tokens: Number of leading tokens that are needed of a document; None: all. The arrays may be longer; the
            value does not change the tokens.
    """
    chunk: list[tuple[int, Record]] = []
    size = 0
    for index, record in records:
        chunk.append((index, record))
        size += 0 if isinstance(record, Fault) else len(record)
        if len(chunk) == _CHUNK_DOCUMENTS or size >= _CHUNK_BYTES:
            yield from _encode_chunk(chunk, tokenizer, text_field, max_tokens)
            chunk, size = [], 0
    yield from _encode_chunk(chunk, tokenizer, text_field, max_tokens)


def _encode_chunk(
    chunk: list[tuple[int, Record]], tokenizer: Encoder, text_field: str, max_tokens: int | None
) -> Iterator[tuple[int, TokenIds | Fault]]:
    parsed = [parse(record, text_field) for _, record in chunk]
    encoded = iter(_encode_texts([text for text in parsed if isinstance(text, str)], tokenizer, max_tokens))
    for (index, _), result in zip(chunk, parsed, strict=True):
        if isinstance(result, Fault):
            yield index, result
        else:
            ids = next(encoded)
            yield index, ids if len(ids) else Fault.EMPTY


def _encode_texts(texts: list[str], tokenizer: Encoder, max_tokens: int | None) -> list[TokenIds]:
    """Returns token ids of the texts; with `max_tokens`, of a prefix of each text that gives at least as many.

    Tokenizing whole books would cost several times as much.
    """
    if max_tokens is None or not tokenizer.breaks_at_spaces:
        return tokenizer.encode(texts)
    limit = max_tokens * _CHARS_PER_TOKEN
    prefixes = [_prefix(text, limit) for text in texts]
    encoded = tokenizer.encode(prefixes)
    while short := [i for i, text in enumerate(texts) if len(encoded[i]) < max_tokens and len(prefixes[i]) < len(text)]:
        limit *= 4
        for i in short:
            prefixes[i] = _prefix(texts[i], limit)
        for i, ids in zip(short, tokenizer.encode([prefixes[i] for i in short]), strict=True):
            encoded[i] = ids
    return encoded


def _prefix(text: str, limit: int) -> str:
    """Returns the text up to a space, at most `limit` characters; all of it if it is shorter or has no such space.

    The character before the space is one that normalization keeps and does not turn into a space.
    """
    end = limit if len(text) > limit else 0
    while (end := text.rfind(" ", 0, end)) > 0:
        if text[end - 1].isalnum() or "!" <= text[end - 1] <= "~":
            return text[:end]
    return text
