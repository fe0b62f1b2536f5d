"""Virtual streams: each reads its units without end and makes rows of them, from any position onwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from sltrain_dist.data import order
from sltrain_dist.data.documents import SAMPLE, Encoder, Fault, Tally, TokenIds
from sltrain_dist.data.sources.identity import FileIdentity
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.data.sources.retry import Cause, Fetcher, RetryPolicy
from sltrain_dist.data.sources.token_shards import TokenManifest
from sltrain_dist.data.stream.corpus import Block, Corpus, TextCorpus
from sltrain_dist.data.stream.rows import Batching, Truncate, make_rows
from sltrain_dist.errors import CheckpointError, DataError


class WeightedSource(NamedTuple):
    """One of several sources."""

    shards: int
    """Number of its shards."""
    weight: float
    """Its share of the rows, relative to the others'."""


@dataclass(frozen=True)
class StreamSettings:
    """What determines the rows of all streams, besides the tokenizer."""

    shards: tuple[str, ...]
    """Those of the text, also where token shards were made of them."""
    text_field: str
    seed: int
    streams: int
    """Number of virtual streams, over all ranks."""
    batching: Batching
    seq_len: int
    shuffle_block: int
    max_bad_fraction: float
    prepared: TokenManifest | None = None
    """The token shards to read in place of the text."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """Without influence on the rows."""
    mixture: tuple[WeightedSource, ...] = ()
    """The sources that the shards belong to, in order, if their rows are mixed by weight. Empty: one source."""
    mark: bool = False
    """Whether documents' first tokens carry `batching.BEGIN`."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Longer documents are unusable."""
    files: Mapping[str, FileIdentity] = field(default_factory=dict)
    """What the local files that are read were like at the start, by path."""
    truncate: Truncate = "text"
    """For pad: what ends a row that its document is too long for."""


class StreamState(NamedTuple):
    """Where a stream stands: what it takes to go on at exactly the next row, and its counts in this epoch."""

    rows: int = 0
    """Rows made since the beginning of training."""
    epoch: int = 0
    unit: int = 0
    """Index among the stream's units of this epoch."""
    block: int = 0
    """Index among the blocks of the unit."""
    document: int = 0
    """Index in the permuted block of the document with which the next row begins."""
    token: int = 0
    """Index in this document of the token with which the next row begins; always 0 for pad."""
    documents: int = 0
    """Documents read in this epoch and done with, unusable ones included."""
    not_json: int = 0
    no_text: int = 0
    invalid_utf8: int = 0
    empty: int = 0
    too_long: int = 0

    def tally(self, example: tuple[str, int, Fault] | None = None) -> Tally:
        """The counts of this epoch."""
        return Tally(self.documents, Counter({fault: getattr(self, fault.value) for fault in Fault}), example)

    def after(self, fault: Fault | None) -> StreamState:
        """The position after one more document, which could be used or not."""
        counts = {fault.value: getattr(self, fault.value) + 1} if fault else {}
        return self._replace(document=self.document + 1, token=0, documents=self.documents + 1, **counts)

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return self._asdict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamState:
        """The inverse of :meth:`to_dict`. Raises CheckpointError if the values are not those of a state."""
        expected = set(cls._fields)
        values = {"too_long": 0, **values}  # not in cursors from before there was such a cause
        if set(values) != expected or not all(type(value) is int and value >= 0 for value in values.values()):
            raise CheckpointError(f"the checkpoint's data cursor is damaged: {dict(values)} is no stream position")
        return cls(**values)


Piece = TypeVar("Piece")
"""What a kind of stream reads at a time."""


class _Share(NamedTuple):
    """The source that a stream reads, and which of the source's streams it is."""

    first_shard: int
    shards: int
    streams: int
    number: int

    @classmethod
    def of(cls, settings: StreamSettings, stream: int) -> _Share:
        if not settings.mixture:
            return cls(0, len(settings.shards), settings.streams, stream)
        dealt = order.deal_streams([source.weight for source in settings.mixture], settings.streams)
        own = dealt[stream]
        first = sum(source.shards for source in settings.mixture[:own])
        return cls(first, settings.mixture[own].shards, dealt.count(own), dealt[:stream].count(own))

    def units(self, seed: int, epoch: int) -> list[order.Unit]:
        """Those of the stream in an epoch. Shards are numbered over all sources."""
        units = order.stream_units(seed, epoch, self.shards, self.streams, self.number)
        return [unit._replace(shard=unit.shard + self.first_shard) for unit in units]


class _Document(NamedTuple):
    ids: TokenIds
    start: StreamState
    end: StreamState


class StreamBase(ABC, Generic[Piece]):
    """One virtual stream: the order of documents and the check of their quality. A subclass makes the rows.

    Args:
        settings: What all streams have in common.
        corpus: The documents.
        number: Which of the streams this is.
        state: Where to start.
    """

    def __init__(self, settings: StreamSettings, corpus: Corpus, number: int, state: StreamState) -> None:
        self.state = state
        """Position after the last row taken."""
        self.documents_read = 0
        """Documents read by this object, unusable ones included."""
        self.faults_found: Counter[Fault] = Counter()
        """How many of these were unusable, by cause."""
        self._settings = settings
        self._corpus = corpus
        self.retries: Counter[Cause] = Counter()
        """How often something remote was tried again, by cause."""
        self._number = number
        self._share = _Share.of(settings, number)
        self._accepted: set[int] = set()

    @abstractmethod
    def take(self, count: int) -> TokenIds:
        """The next rows, shape (count, seq_len + 1).

        Raises:
            DataError: A shard cannot be read, has too many unusable documents, or an epoch has no usable one.
        """

    @abstractmethod
    def _block(self, unit: order.Unit, state: StreamState, block: Block) -> Generator[Piece, None, StreamState]:
        """The usable documents of a block from a position in it onwards; returns the position after it."""

    def _pieces(self, state: StreamState) -> Iterator[Piece]:
        """Usable documents without end, from a position onwards."""
        settings = self._settings
        while True:
            units = self._share.units(settings.seed, state.epoch)
            for unit in units[state.unit :]:
                state = yield from self._unit(unit, state)
            if state.documents == state.tally().faults.total():
                raise self._nothing_usable(state, units)
            state = StreamState(rows=state.rows, epoch=state.epoch + 1)

    def _nothing_usable(self, state: StreamState, units: list[order.Unit]) -> DataError:
        """The error after an epoch without a usable document, which would be followed by others of the same kind."""
        names = list(dict.fromkeys(self._settings.shards[unit.shard] for unit in units))
        where = f"its share of the source, parts of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        if state.documents == 0:
            return DataError(
                f"data stream {self._number} of {self._settings.streams} has no document in {where}: every stream "
                "needs one at least. Set data.streams to no more than there are documents, or check whether the files "
                "are empty"
            )
        causes = ", ".join(f"{fault.value}: {count}" for fault, count in state.tally().faults.items() if count)
        return DataError(
            f"data stream {self._number} of {self._settings.streams} has no usable document among the "
            f"{state.documents} in {where} ({causes}): every stream needs one at least. Repair the files, check "
            f"data.text_field={self._settings.text_field!r}, or lower data.streams, so that each has more documents"
        )

    def _unit(self, unit: order.Unit, state: StreamState) -> Generator[Piece, None, StreamState]:
        """The documents of one unit from a position in it onwards; returns the position after it."""
        size = self._settings.shuffle_block
        first = unit.part + state.block * size * unit.parts
        for block in self._corpus.blocks(unit.shard, first, unit.parts, size):
            state = yield from self._block(unit, state, block)
            state = state._replace(block=state.block + 1, document=0)
        self._check_unit(unit, state)
        return state._replace(unit=state.unit + 1, block=0, document=0)

    def _pass_unusable(self, unit: order.Unit, state: StreamState, line: int, fault: Fault) -> StreamState:
        """Counts an unusable document; returns the position after it."""
        self.documents_read += 1
        self.faults_found[fault] += 1
        state = state.after(fault)
        if state.documents >= SAMPLE:
            self._check(unit, state.tally((self._settings.shards[unit.shard], line, fault)))
        return state

    def _check_unit(self, unit: order.Unit, state: StreamState) -> None:
        """Checks the share of unusable documents at the end of a unit.

        One bad line among the dozen that a stream has of a small file says nothing about the source. So, if
        the stream's own share is too large but comes of few documents, that of the next `SAMPLE` documents
        from this shard on (or of the whole source, if it has fewer) decides.
        """
        own = state.tally()
        if own.documents >= SAMPLE:
            self._check(unit, own)
        if not own.exceeds(self._settings.max_bad_fraction) or unit.shard in self._accepted:
            return
        shards = self._settings.shards
        first, last = self._share.first_shard, self._share.first_shard + self._share.shards
        numbers = [*range(unit.shard, last), *range(first, unit.shard)]
        outcomes = ((shards[n], index, outcome) for n in numbers for index, outcome in self._corpus.outcomes(n))
        sample = Tally()
        for outcome in islice(outcomes, SAMPLE):
            sample.add(*outcome)
        self._check(unit, sample)
        self._accepted.add(unit.shard)

    def _check(self, unit: order.Unit, tally: Tally) -> None:
        limit = self._settings.max_bad_fraction
        if tally.exceeds(limit):
            where = f"training data, at {self._settings.shards[unit.shard]} (stream {self._number})"
            raise tally.error(where, limit, self._settings.text_field)


class Stream(StreamBase[_Document]):
    """One virtual stream of text, document by document.

    Args:
        settings: What all streams have in common.
        tokenizer: The tokenizer.
        number: Which of the streams this is.
        state: Where to start.
    """

    def __init__(self, settings: StreamSettings, tokenizer: Encoder, number: int, state: StreamState) -> None:
        max_tokens = settings.seq_len if settings.batching == "pad" else None
        fetcher = Fetcher(settings.retry)
        corpus = TextCorpus(
            settings.shards,
            tokenizer,
            settings.text_field,
            max_tokens,
            fetcher,
            settings.max_document_bytes,
            settings.files,
        )
        super().__init__(settings, corpus, number, state)
        self.retries = fetcher.retries
        self._eos_id = tokenizer.eos_id
        self._rows = self._make_rows(state)

    def take(self, count: int) -> TokenIds:
        """The next rows, see :class:`StreamBase`."""
        rows = np.empty((count, self._settings.seq_len + 1), dtype=np.int32)
        for index, (row, state) in enumerate(islice(self._rows, count)):
            rows[index] = row
            self.state = state
        return rows

    def _make_rows(self, state: StreamState) -> Iterator[tuple[TokenIds, StreamState]]:
        """Rows without end, each with the position after it."""
        settings = self._settings
        pending: list[_Document] = []  # taken, and not finished before the last row
        passed = 0  # documents that were dropped from there

        def ids_of(documents: Iterable[_Document]) -> Iterator[TokenIds]:
            for document in documents:
                pending.append(document)
                yield document.ids

        rows = make_rows(
            ids_of(self._pieces(state._replace(token=0))),
            settings.batching,
            seq_len=settings.seq_len,
            eos_id=self._eos_id,
            truncate=settings.truncate,
            offset=state.token,
            mark=settings.mark,
        )
        for number, row in enumerate(rows, start=state.rows + 1):
            done = row.finished - passed
            position = pending[done].start if done < len(pending) else pending[done - 1].end
            del pending[:done]
            passed = row.finished
            yield row.tokens, position._replace(rows=number, token=row.offset)

    def _block(self, unit: order.Unit, state: StreamState, block: Block) -> Generator[_Document, None, StreamState]:
        settings = self._settings
        permuted = order.block_permutation(settings.seed, state.epoch, unit, state.block, len(block))
        for line, result in block.documents(permuted[state.document :]):
            if isinstance(result, Fault):
                state = self._pass_unusable(unit, state, line, result)
            else:
                self.documents_read += 1
                end = state.after(None)
                yield _Document(result, state, end)
                state = end
        return state
