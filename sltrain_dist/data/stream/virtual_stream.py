"""Virtual streams: each reads its units endlessly, from any position onwards, and makes rows of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from sltrain_dist.data import order
from sltrain_dist.data.documents import SAMPLE, Fault, Tally, TokenIds
from sltrain_dist.data.sources.identity import FileIdentity
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.data.sources.retry import RetryPolicy
from sltrain_dist.data.sources.token_shards import TokenManifest
from sltrain_dist.data.stream.corpus import Block, Corpus
from sltrain_dist.data.stream.rows import Batching, RowMaker, Segment, Truncate
from sltrain_dist.errors import CheckpointError, DataError


class WeightedSource(NamedTuple):
    """One source of a weighted mixture."""

    shards: int
    """Number of shards of the source."""
    weight: float
    """Share of the rows, relative to the other sources' weights."""


@dataclass(frozen=True)
class StreamSettings:
    """Settings of all streams; with the tokenizer they determine the rows."""

    shards: tuple[str, ...]
    """Shards of the text, even if token shards made from them are read."""
    text_field: str
    seed: int
    streams: int
    """Number of virtual streams, over all ranks."""
    batching: Batching
    seq_len: int
    shuffle_block: int
    max_bad_fraction: float
    prepared: TokenManifest | None = None
    """Token shards to read instead of the text."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """Does not influence the rows."""
    mixture: tuple[WeightedSource, ...] = ()
    """The sources of the shards, in order, if rows are mixed by weight. Empty: one source."""
    mark: bool = False
    """Whether documents' first tokens are marked, see `rows.split_marks`."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Longer documents are unusable."""
    files: Mapping[str, FileIdentity] = field(default_factory=dict)
    """Identities at the start of the local files that are read, by path."""
    truncate: Truncate = "text"
    """For pad: how a row ends if its document is too long, with text or eos."""


class StreamState(NamedTuple):
    """Position of a stream, from which it continues with exactly the next row, and its counts in this epoch."""

    rows: int = 0
    """Number of rows made since the beginning of training."""
    epoch: int = 0
    unit: int = 0
    """Index of the unit among the stream's units of this epoch."""
    block: int = 0
    """Index of the block in the unit."""
    document: int = 0
    """Index in the permuted block of the document in which the next row begins."""
    token: int = 0
    """Index in this document of the next row's first token; always 0 for pad."""
    documents: int = 0
    """Number of documents finished in this epoch, unusable ones included."""
    not_json: int = 0
    no_text: int = 0
    invalid_utf8: int = 0
    empty: int = 0
    too_long: int = 0

    def tally(self, example: tuple[str, int, Fault] | None = None) -> Tally:
        """Returns the counts of this epoch."""
        return Tally(self.documents, Counter({fault: getattr(self, fault.value) for fault in Fault}), example)

    def after(self, fault: Fault) -> StreamState:
        """Returns the position after an unusable document."""
        found = {fault.value: getattr(self, fault.value) + 1}
        return self._replace(document=self.document + 1, documents=self.documents + 1, **found)

    def to_dict(self) -> dict[str, int]:
        """Returns the values for JSON."""
        return self._asdict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamState:
        """Inverts :meth:`to_dict`. Raises CheckpointError if the values are not a valid state."""
        expected = set(cls._fields)
        values = {"too_long": 0, **values}  # cursors of older versions lack this cause
        if set(values) != expected or not all(type(value) is int and value >= 0 for value in values.values()):
            raise CheckpointError(f"the checkpoint's data cursor is damaged: {dict(values)} is not a stream position")
        return cls(**values)


class _Share(NamedTuple):
    """The source that a stream reads, and the stream's number among those of the source."""

    first_shard: int
    shards: int
    streams: int
    number: int

    @classmethod
    def of(cls, settings: StreamSettings, stream: int) -> _Share:
        if not settings.mixture:
            return cls(0, len(settings.shards), settings.streams, stream)
        sources = order.deal_streams([source.weight for source in settings.mixture], settings.streams)
        own = sources[stream]
        first = sum(source.shards for source in settings.mixture[:own])
        return cls(first, settings.mixture[own].shards, sources.count(own), sources[:stream].count(own))

    def units(self, seed: int, epoch: int) -> list[order.Unit]:
        """Returns the stream's units of an epoch. Shards are numbered over all sources."""
        units = order.stream_units(seed, epoch, self.shards, self.streams, self.number)
        return [unit._replace(shard=unit.shard + self.first_shard) for unit in units]


class Stream:
    """One virtual stream: its documents in order, made into rows, and the limit on unusable ones.

    Args:
        settings: Settings of all streams.
        corpus: The documents.
        number: Number of this stream.
        state: Start position.
    """

    def __init__(self, settings: StreamSettings, corpus: Corpus, number: int, state: StreamState) -> None:
        self.state = state
        """Position after the last row taken."""
        self.faults_found: Counter[Fault] = Counter()
        """Number of unusable documents read by this object, by cause."""
        self._settings = settings
        self._corpus = corpus
        self._number = number
        self._share = _Share.of(settings, number)
        self._accepted_shards: set[int] = set()
        self._segment_start = state
        """Position of the first document of the segment that rows are being made of."""
        self._rows = RowMaker(
            self._segments(state._replace(token=0)),
            settings.batching,
            seq_len=settings.seq_len,
            truncate=settings.truncate,
            offset=state.token,
            mark=settings.mark,
        )

    @property
    def documents_read(self) -> int:
        """Number of documents read by this object, unusable ones included."""
        return self._rows.documents_begun + self.faults_found.total()

    def take(self, count: int) -> TokenIds:
        """Returns the next rows, shape (count, seq_len + 1). After an error, the stream cannot be read any further.

        Raises:
            DataError: A shard cannot be read, has too many unusable documents, or an epoch has no usable one.
        """
        rows = self._rows.take(count)
        start = self._segment_start
        self.state = start._replace(
            rows=self.state.rows + count,
            document=start.document + self._rows.index,
            documents=start.documents + self._rows.index,
            token=self._rows.offset,
        )
        return rows

    def _segments(self, state: StreamState) -> Iterator[Segment]:
        """Yields usable documents endlessly, from a position onwards."""
        settings = self._settings
        while True:
            units = self._share.units(settings.seed, state.epoch)
            for unit in units[state.unit :]:
                state = yield from self._unit(unit, state)
            if state.documents == state.tally().faults.total():
                raise self._empty_epoch_error(state, units)
            state = StreamState(rows=state.rows, epoch=state.epoch + 1)

    def _empty_epoch_error(self, state: StreamState, units: list[order.Unit]) -> DataError:
        """Returns the error for an epoch without a usable document: all later epochs would be the same."""
        names = list(dict.fromkeys(self._settings.shards[unit.shard] for unit in units))
        where = f"its share of the source, parts of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        if state.documents == 0:
            return DataError(
                f"data stream {self._number} of {self._settings.streams} has no document in {where}: every stream "
                "needs at least one. Set data.streams to at most the number of documents, or check whether the files "
                "are empty"
            )
        causes = ", ".join(f"{fault.value}: {count}" for fault, count in state.tally().faults.items() if count)
        return DataError(
            f"data stream {self._number} of {self._settings.streams} has no usable document among the "
            f"{state.documents} in {where} ({causes}): every stream needs at least one. Repair the files, check "
            f"data.text_field={self._settings.text_field!r}, or lower data.streams so that each has more documents"
        )

    def _unit(self, unit: order.Unit, state: StreamState) -> Generator[Segment, None, StreamState]:
        """Yields the documents of one unit, from a position in it onwards; returns the position after it."""
        size = self._settings.shuffle_block
        first = unit.part + state.block * size * unit.parts
        for block in self._corpus.blocks(unit.shard, first, unit.parts, size):
            state = yield from self._block(unit, state, block)
            state = state._replace(block=state.block + 1, document=0)
        self._check_unit(unit, state)
        return state._replace(unit=state.unit + 1, block=0, document=0)

    def _block(self, unit: order.Unit, state: StreamState, block: Block) -> Generator[Segment, None, StreamState]:
        """Yields the documents of a block, from a position in it onwards; returns the position after it."""
        permuted = order.block_permutation(self._settings.seed, state.epoch, unit, state.block, len(block))
        for line, segment in block.segments(permuted[state.document :]):
            if isinstance(segment, Fault):
                state = self._pass_unusable(unit, state, line, segment)
            else:
                self._segment_start = state
                yield segment
                count = len(segment.starts)
                state = state._replace(document=state.document + count, documents=state.documents + count)
        return state

    def _pass_unusable(self, unit: order.Unit, state: StreamState, line: int, fault: Fault) -> StreamState:
        """Counts an unusable document; returns the position after it."""
        self.faults_found[fault] += 1
        state = state.after(fault)
        if state.documents >= SAMPLE:
            self._check(unit, state.tally((self._settings.shards[unit.shard], line, fault)))
        return state

    def _check_unit(self, unit: order.Unit, state: StreamState) -> None:
        """Checks the share of unusable documents at the end of a unit.

        One bad line among the dozen that a stream reads of a small file says nothing about the source. So, if
        the share is too large but the stream has read few documents, the share among the next `SAMPLE` documents
        from this shard on (or among the whole source, if it has fewer) decides.
        """
        own = state.tally()
        if own.documents >= SAMPLE:
            self._check(unit, own)
        if not own.exceeds(self._settings.max_bad_fraction) or unit.shard in self._accepted_shards:
            return
        shards = self._settings.shards
        first, last = self._share.first_shard, self._share.first_shard + self._share.shards
        numbers = [*range(unit.shard, last), *range(first, unit.shard)]
        outcomes = ((shards[n], index, outcome) for n in numbers for index, outcome in self._corpus.outcomes(n))
        sample = Tally()
        for outcome in islice(outcomes, SAMPLE):
            sample.add(*outcome)
        self._check(unit, sample)
        self._accepted_shards.add(unit.shard)

    def _check(self, unit: order.Unit, tally: Tally) -> None:
        limit = self._settings.max_bad_fraction
        if tally.exceeds(limit):
            where = f"training data, at {self._settings.shards[unit.shard]} (stream {self._number})"
            raise tally.error(where, limit, self._settings.text_field)
