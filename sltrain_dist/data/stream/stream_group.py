"""Some virtual streams together: a rank's, or those of one of its workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sltrain_dist.data import order
from sltrain_dist.data.documents import Encoder, Fault, TokenIds
from sltrain_dist.data.sources.retry import Cause
from sltrain_dist.data.stream.corpus import TokenCorpus
from sltrain_dist.data.stream.token_stream import TokenStream
from sltrain_dist.data.stream.virtual_stream import Stream, StreamBase, StreamSettings, StreamState


class UpdateRows(NamedTuple):
    """What some streams give to one update."""

    rows: TokenIds
    """Shape (rows, seq_len + 1)."""
    states: dict[int, StreamState]
    """Position of each stream after these rows."""
    documents_read: int
    """Documents read by these streams since their start in this process, unusable ones included."""
    faults_found: Counter[Fault]
    """How many of these were unusable, by cause."""
    retries: Counter[Cause]
    """How often these streams have tried to read again, by cause, since then."""


class StreamGroup:
    """Some streams, read in turn: a rank's, or those of one of its workers.

    Args:
        settings: What all streams have in common.
        tokenizer: The tokenizer.
        shares: The streams, and what of each is kept.
        states: Where each stream starts.
    """

    def __init__(
        self,
        settings: StreamSettings,
        tokenizer: Encoder,
        shares: Sequence[order.StreamShare],
        states: Mapping[int, StreamState],
    ) -> None:
        self._shares = shares
        self._streams: list[StreamBase[Any]]
        if settings.prepared is None:
            self._streams = [Stream(settings, tokenizer, share.stream, states[share.stream]) for share in shares]
        else:
            corpus = TokenCorpus(settings.prepared, settings.files)
            self._streams = [TokenStream(settings, corpus, share.stream, states[share.stream]) for share in shares]

    def next_update(self) -> UpdateRows:
        """The rows of the next update. Raises DataError as :meth:`Stream.take` does."""
        rows = [
            stream.take(share.rows)[share.begin : share.end]
            for share, stream in zip(self._shares, self._streams, strict=True)
        ]
        return UpdateRows(
            np.concatenate(rows),
            {share.stream: stream.state for share, stream in zip(self._shares, self._streams, strict=True)},
            sum(stream.documents_read for stream in self._streams),
            sum((stream.faults_found for stream in self._streams), Counter()),
            sum((stream.retries for stream in self._streams), Counter()),
        )
