"""Groups of virtual streams: all of a rank, or those of one of its workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sltrain_dist.data import order
from sltrain_dist.data.documents import Encoder, Fault, TokenIds
from sltrain_dist.data.sources.retry import Cause, Fetcher
from sltrain_dist.data.stream.corpus import open_corpus
from sltrain_dist.data.stream.virtual_stream import Stream, StreamSettings, StreamState


class UpdateRows(NamedTuple):
    """Rows that a group of streams contributes to one update."""

    rows: TokenIds
    """Shape (rows, seq_len + 1)."""
    states: dict[int, StreamState]
    """Position of each stream after these rows."""
    documents_read: int
    """Number of documents that these streams read since their start in this process, unusable ones included."""
    faults_found: Counter[Fault]
    """Number of unusable ones among these, by cause."""
    retries: Counter[Cause]
    """Number of retries since the same start, by cause."""


class StreamGroup:
    """A group of virtual streams, read in turn: all of a rank, or those of one of its workers.

    Args:
        settings: Settings of all streams.
        tokenizer: The tokenizer.
        shares: The streams, and the rows to keep of each.
        states: Start position of each stream.
    """

    def __init__(
        self,
        settings: StreamSettings,
        tokenizer: Encoder,
        shares: Sequence[order.StreamShare],
        states: Mapping[int, StreamState],
    ) -> None:
        self._shares = shares
        self._fetcher = Fetcher(settings.retry)
        corpus = open_corpus(
            settings.shards,
            settings.prepared,
            tokenizer,
            settings.text_field,
            settings.seq_len if settings.batching == "pad" else None,
            self._fetcher,
            settings.max_document_bytes,
            settings.files,
        )
        self._streams = [Stream(settings, corpus, share.stream, states[share.stream]) for share in shares]

    def next_update(self) -> UpdateRows:
        """Returns the rows of the next update. Raises DataError as :meth:`Stream.take` does."""
        rows = [
            stream.take(share.rows)[share.begin : share.end]
            for share, stream in zip(self._shares, self._streams, strict=True)
        ]
        return UpdateRows(
            np.concatenate(rows),
            {share.stream: stream.state for share, stream in zip(self._shares, self._streams, strict=True)},
            sum(stream.documents_read for stream in self._streams),
            sum((stream.faults_found for stream in self._streams), Counter()),
            self._fetcher.retries.copy(),
        )
