"""Corpora: a source's documents in blocks, read from text and tokenized, or read from token shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sltrain_dist.data.documents import Encoder, Fault, Record, encode_documents, parse
from sltrain_dist.data.sources.identity import FileIdentity, check_unchanged
from sltrain_dist.data.sources.resolve import read_documents
from sltrain_dist.data.sources.retry import Fetcher
from sltrain_dist.data.sources.token_shards import ShardReader, TokenManifest
from sltrain_dist.data.stream.rows import Segment

Order = npt.NDArray[np.int64]

NO_FILES: Mapping[str, FileIdentity] = MappingProxyType({})
"""Default for expected identities: no file is checked."""
_OPEN_SHARDS = 64
"""Largest number of open token shards, which streams share."""


class Block(Protocol):
    """A block of documents, whose order is permuted."""

    def __len__(self) -> int:
        """Returns the number of documents, unusable ones included."""
        ...

    def segments(self, order: Order) -> Iterator[tuple[int, Segment | Fault]]:
        """Yields the documents with the given indices in the block: segments of usable ones, and the fault of each
        unusable one, with the line index of the (first) document."""
        ...


class Corpus(Protocol):
    """Interface to the documents in the shards of a source."""

    def blocks(self, shard: int, first: int, step: int, size: int) -> Iterator[Block]:
        """Yields documents `first`, `first + step`, … of a shard in blocks of `size`; the last may be smaller."""
        ...

    def outcomes(self, shard: int) -> Iterator[tuple[int, object]]:
        """Yields the line index of every document, and its :class:`Fault` if one can be found without tokenizing."""
        ...


def open_corpus(
    shards: Sequence[str],
    prepared: TokenManifest | None,
    tokenizer: Encoder,
    text_field: str,
    max_tokens: int | None,
    fetcher: Fetcher,
    max_document_bytes: int,
    files: Mapping[str, FileIdentity] = NO_FILES,
) -> Corpus:
    """Opens token shards, or text files.

    Args:
        shards: The text files.
        prepared: Token shards to read instead of the text.
        tokenizer: The tokenizer.
        text_field: Key of the text in each JSON line.
        max_tokens: Number of leading tokens that are needed of a document; None: all. The arrays may be longer.
        fetcher: Retries failed reads of remote text.
        max_document_bytes: Longer documents are unusable. For token shards, their preparation applied the limit.
        files: Expected identities of the files that are read, by path.
    """
    if prepared is not None:
        return _TokenCorpus(prepared, files)
    return _TextCorpus(shards, tokenizer, text_field, max_tokens, fetcher, max_document_bytes, files)


class _TextCorpus:
    """Corpus of JSON-lines files or tables. See :func:`open_corpus`."""

    def __init__(
        self,
        shards: Sequence[str],
        tokenizer: Encoder,
        text_field: str,
        max_tokens: int | None,
        fetcher: Fetcher,
        max_document_bytes: int,
        files: Mapping[str, FileIdentity],
    ) -> None:
        self._shards = shards
        self._tokenizer = tokenizer
        self._eos = np.array([tokenizer.eos_id], dtype=np.int32)
        self._text_field = text_field
        self._max_tokens = max_tokens
        self._fetcher = fetcher
        self._max_document_bytes = max_document_bytes
        self._files = files

    def blocks(self, shard: int, first: int, step: int, size: int) -> Iterator[_TextBlock]:
        """See :class:`Corpus`."""
        lines = self._read(shard, first, step)
        while block := list(islice(lines, size)):
            yield _TextBlock(self, block)

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

    def encode(self, lines: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, Segment | Fault]]:
        """Yields line index and token ids, or fault, of unparsed documents."""
        for line, result in encode_documents(lines, self._tokenizer, self._text_field, self._max_tokens):
            if isinstance(result, Fault):
                yield line, result
            else:
                yield line, Segment(np.concatenate((result, self._eos)), [0], [len(result) + 1])


class _TextBlock:
    def __init__(self, corpus: _TextCorpus, lines: list[tuple[int, Record]]) -> None:
        self._corpus = corpus
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def segments(self, order: Order) -> Iterator[tuple[int, Segment | Fault]]:
        return self._corpus.encode(self._lines[index] for index in order)


class _TokenCorpus:
    """Corpus of token shards. See :func:`open_corpus`."""

    def __init__(self, manifest: TokenManifest, files: Mapping[str, FileIdentity]) -> None:
        self._manifest = manifest
        self._files = files
        self._readers: dict[int, ShardReader] = {}

    def blocks(self, shard: int, first: int, step: int, size: int) -> Iterator[_TokenBlock]:
        """See :class:`Corpus`."""
        reader = self._reader(shard)
        documents = np.arange(first, reader.documents, step)
        for start in range(0, len(documents), size):
            # Checked per block, because reading a mapped file that was truncated kills the process.
            for path in self._manifest.files(shard):
                check_unchanged(path, self._files.get(path))
            yield _TokenBlock(reader, documents[start : start + size])

    def outcomes(self, shard: int) -> Iterator[tuple[int, object]]:
        """See :class:`Corpus`. Faults that only tokenizing finds are included: they are stored in the shards."""
        reader = self._reader(shard)
        return ((index, reader.fault(index)) for index in range(reader.documents))

    def _reader(self, shard: int) -> ShardReader:
        """Returns the open shard, which all streams that read parts of it share."""
        if shard not in self._readers:
            if len(self._readers) == _OPEN_SHARDS:
                del self._readers[next(iter(self._readers))]
            self._readers[shard] = ShardReader(self._manifest, shard)
        return self._readers[shard]


class _TokenBlock:
    """A block of documents of a token shard, given by their indices in the shard."""

    def __init__(self, reader: ShardReader, documents: Order) -> None:
        self._reader = reader
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def segments(self, order: Order) -> Iterator[tuple[int, Segment | Fault]]:
        reader, documents = self._reader, self._documents[order]
        starts, ends = reader.starts[documents], reader.starts[documents + 1]
        first = 0
        for unusable in [*np.flatnonzero(starts == ends).tolist(), len(documents)]:
            if first < unusable:
                span = slice(first, unusable)
                yield int(documents[first]), Segment(reader.tokens, starts[span].tolist(), ends[span].tolist())
            if unusable < len(documents):
                line = int(documents[unusable])
                fault = reader.fault(line)
                assert fault is not None
                yield line, fault
            first = unusable + 1
