"""The documents of a source, in blocks: read from text and tokenized, or from token shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sltrain_dist.data.documents import Encoder, Fault, Record, TokenIds, encode_documents, parse
from sltrain_dist.data.sources.identity import FileIdentity, check_unchanged
from sltrain_dist.data.sources.resolve import read_documents
from sltrain_dist.data.sources.retry import Fetcher
from sltrain_dist.data.sources.token_shards import ShardReader, TokenManifest

Order = npt.NDArray[np.int64]

NO_FILES: Mapping[str, FileIdentity] = MappingProxyType({})
"""Nothing is known of any file."""
_OPEN_SHARDS = 64
"""Token shards that are kept open for the streams that have parts of them."""


class Block(Protocol):
    """Some documents that are permuted together."""

    def __len__(self) -> int:
        """Number of documents, unusable ones included."""
        ...

    def documents(self, order: Order) -> Iterator[tuple[int, TokenIds | Fault]]:
        """Line index, and token ids or what is wrong, of the documents of the given indices in the block."""
        ...


class Corpus(Protocol):
    """The shards of a source."""

    def blocks(self, shard: int, first: int, step: int, size: int) -> Iterator[Block]:
        """Documents `first`, `first + step`, … of a shard in blocks of `size`; the last may be smaller."""
        ...

    def outcomes(self, shard: int) -> Iterator[tuple[int, object]]:
        """Line index of every document of a shard, and its :class:`Fault` if it has one that needs no tokenizer."""
        ...


def open_corpus(
    shards: Sequence[str],
    prepared: TokenManifest | None,
    tokenizer: Encoder,
    text_field: str,
    max_tokens: int | None,
    fetcher: Fetcher,
    max_document_bytes: int,
) -> Corpus:
    """The documents of token shards, or of text.

    Args:
        shards: The files of text.
        prepared: The token shards to read in their place.
        tokenizer: The tokenizer.
        text_field: Key of the text in each JSON line.
        max_tokens: How many leading tokens of a document matter; None: all. More may come.
        fetcher: Decides about failures to read remote text.
        max_document_bytes: Longer documents are unusable; those of token shards were so when they were prepared.
    """
    if prepared is not None:
        return TokenCorpus(prepared)
    return TextCorpus(shards, tokenizer, text_field, max_tokens, fetcher, max_document_bytes)


class TextCorpus:
    """Files of JSON lines or tables. See :func:`open_corpus`; `files` is what local ones must be like."""

    def __init__(
        self,
        shards: Sequence[str],
        tokenizer: Encoder,
        text_field: str,
        max_tokens: int | None,
        fetcher: Fetcher,
        max_document_bytes: int,
        files: Mapping[str, FileIdentity] = NO_FILES,
    ) -> None:
        self._shards = shards
        self._tokenizer = tokenizer
        self._text_field = text_field
        self._max_tokens = max_tokens
        self._fetcher = fetcher
        self._max_document_bytes = max_document_bytes
        self._files = files

    def blocks(self, shard: int, first: int, step: int, size: int) -> Iterator[_TextBlock]:
        """See :class:`Corpus`."""
        lines = self._read(shard, first, step)
        while some := list(islice(lines, size)):
            yield _TextBlock(self, some)

    def outcomes(self, shard: int) -> Iterator[tuple[int, object]]:
        """See :class:`Corpus`."""
        return ((index, parse(record, self._text_field)) for index, record in self._read(shard))

    def _read(self, shard: int, first: int = 0, step: int = 1) -> Iterator[tuple[int, Record]]:
        name = self._shards[shard]
        return read_documents(
            name,
            self._text_field,
            first,
            step,
            self._fetcher,
            max_bytes=self._max_document_bytes,
            expected=self._files.get(name),
        )

    def encode(self, lines: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, TokenIds | Fault]]:
        """Token ids of documents."""
        return encode_documents(lines, self._tokenizer, self._text_field, self._max_tokens)


class _TextBlock:
    def __init__(self, corpus: TextCorpus, lines: list[tuple[int, Record]]) -> None:
        self._corpus = corpus
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def documents(self, order: Order) -> Iterator[tuple[int, TokenIds | Fault]]:
        return self._corpus.encode(self._lines[index] for index in order)


class TokenCorpus:
    """Token shards.

    Args:
        manifest: The manifest of their directory.
        files: What its files must be like, by path.
    """

    def __init__(self, manifest: TokenManifest, files: Mapping[str, FileIdentity] = NO_FILES) -> None:
        self._manifest = manifest
        self._files = files
        self._readers: dict[int, ShardReader] = {}

    def blocks(self, shard: int, first: int, step: int, size: int) -> Iterator[TokenBlock]:
        """See :class:`Corpus`."""
        reader = self._reader(shard)
        documents = np.arange(first, reader.documents, step)
        for start in range(0, len(documents), size):
            # Here, because reading a part of a mapped file that is not there any more kills the process.
            for path in self._manifest.files(shard):
                check_unchanged(path, self._files.get(path))
            yield TokenBlock(reader, documents[start : start + size])

    def outcomes(self, shard: int) -> Iterator[tuple[int, object]]:
        """See :class:`Corpus`. Here, faults that only the tokenizer has found are known too."""
        reader = self._reader(shard)
        return ((index, reader.fault(index)) for index in range(reader.documents))

    def _reader(self, shard: int) -> ShardReader:
        """The shard, which the streams that have a part of it share, open."""
        if shard not in self._readers:
            if len(self._readers) == _OPEN_SHARDS:
                del self._readers[next(iter(self._readers))]
            self._readers[shard] = ShardReader(self._manifest, shard)
        return self._readers[shard]


class TokenBlock:
    """Some documents of a token shard.

    Args:
        reader: The shard.
        documents: Indices of the documents in it.
    """

    def __init__(self, reader: ShardReader, documents: Order) -> None:
        self._reader = reader
        self._documents = documents
        self.tokens = reader.tokens
        """Those of the shard."""

    def __len__(self) -> int:
        """Number of documents, unusable ones included."""
        return len(self._documents)

    def documents(self, order: Order) -> Iterator[tuple[int, TokenIds | Fault]]:
        """See :class:`Block`."""
        for index, start, end in zip(order, *self.spans(order), strict=True):
            if start == end:
                yield self.unusable(index)
            else:
                yield int(self._documents[index]), self.tokens[start : end - 1].astype(np.int32)

    def spans(self, order: Order) -> tuple[Order, Order]:
        """Where the documents begin and end in the tokens, with their eos; at the same place if unusable."""
        documents = self._documents[order]
        return self._reader.starts[documents], self._reader.starts[documents + 1]

    def unusable(self, index: int) -> tuple[int, Fault]:
        """Line index of an unusable document, and what is wrong with it."""
        document = int(self._documents[index])
        fault = self._reader.fault(document)
        assert fault is not None
        return document, fault
