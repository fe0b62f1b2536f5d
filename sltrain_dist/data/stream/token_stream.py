"""Virtual streams of token shards: the same rows and positions as :class:`Stream`, many documents at a time."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sltrain_dist.data import order
from sltrain_dist.data.documents import TokenIds
from sltrain_dist.data.stream.corpus import Block, TokenBlock, TokenCorpus
from sltrain_dist.data.stream.rows import BEGIN, PADDING
from sltrain_dist.data.stream.virtual_stream import StreamBase, StreamSettings, StreamState


class _Segment(NamedTuple):
    """Consecutive usable documents, without an unusable one between them."""

    tokens: npt.NDArray[Any]
    """Token ids of the whole shard."""
    starts: list[int]
    ends: list[int]
    """Begin and end of each document in the tokens, its eos included."""
    state: StreamState
    """Position of the first document."""


class TokenStream(StreamBase[_Segment]):
    """One virtual stream of token shards.

    Documents are copied from the memory map straight into the rows, and the position is computed once per
    :meth:`take`: computing it per document, as :class:`Stream` does, takes longer than copying the document.

    Args:
        settings: Settings of all streams.
        corpus: The token shards.
        number: Number of this stream.
        state: Start position.
    """

    def __init__(self, settings: StreamSettings, corpus: TokenCorpus, number: int, state: StreamState) -> None:
        super().__init__(settings, corpus, number, state)
        self._segments = self._pieces(state._replace(token=0))
        self._segment: _Segment | None = None
        self._index = 0  # the document of the segment with which the next row begins, or the number of all
        self._offset = state.token

    def take(self, count: int) -> TokenIds:
        """Returns the next rows, see :class:`StreamBase`."""
        rows = self._pad(count) if self._settings.batching == "pad" else self._pack(count)
        assert self._segment is not None
        first = self._segment.state
        self.state = first._replace(
            rows=self.state.rows + count,
            document=first.document + self._index,
            documents=first.documents + self._index,
            token=self._offset,
        )
        return rows

    def _pad(self, count: int) -> TokenIds:
        """Returns the rows that :func:`sltrain_dist.data.stream.rows.pad_rows` makes of the next documents."""
        seq_len = self._settings.seq_len
        rows = np.full((count, seq_len + 1), PADDING, dtype=np.int32)
        filled = 0
        while filled < count:
            segment = self._current()
            stop = min(self._index + count - filled, len(segment.starts))
            spans = zip(segment.starts[self._index : stop], segment.ends[self._index : stop], strict=True)
            for row, (start, end) in zip(rows[filled:], spans, strict=False):
                length = min(end - start, seq_len)
                row[:length] = segment.tokens[start : start + length]
                if self._settings.truncate == "eos":
                    row[length - 1] = segment.tokens[end - 1]
            filled += stop - self._index
            self.documents_read += stop - self._index
            self._index = stop
        return rows

    def _pack(self, count: int) -> TokenIds:
        """Returns the rows that :func:`sltrain_dist.data.stream.rows.pack_rows` makes from the current token on.

        A row's last token is the next row's first, so the position afterwards is that of the last token.
        """
        seq_len = self._settings.seq_len
        tokens = np.empty(count * seq_len + 1, dtype=np.int32)
        filled = 0
        while True:
            if self._segment is None or self._index == len(self._segment.starts):
                self.documents_read += 1
            segment = self._current()
            start = segment.starts[self._index] + self._offset
            length = min(segment.ends[self._index] - start, len(tokens) - filled)
            tokens[filled : filled + length] = segment.tokens[start : start + length]
            if self._settings.mark and self._offset == 0:
                tokens[filled] |= BEGIN
            filled += length
            if filled == len(tokens):
                self._offset += length - 1
                break
            self._index += 1
            self._offset = 0
            if self._index < len(segment.starts):
                self.documents_read += 1
        rows = np.empty((count, seq_len + 1), dtype=np.int32)
        rows[:, :-1] = tokens[:-1].reshape(count, seq_len)
        rows[:, -1] = tokens[seq_len::seq_len]
        return rows

    def _current(self) -> _Segment:
        """Returns the segment that contains the next document."""
        if self._segment is None or self._index == len(self._segment.starts):
            self._segment = next(self._segments)
            self._index = 0
        return self._segment

    def _block(self, unit: order.Unit, state: StreamState, block: Block) -> Generator[_Segment, None, StreamState]:
        assert isinstance(block, TokenBlock)
        permuted = order.block_permutation(self._settings.seed, state.epoch, unit, state.block, len(block))
        starts, ends = block.spans(permuted)
        unusable = np.flatnonzero(starts == ends).tolist()
        for stop in [*(index for index in unusable if index >= state.document), len(block)]:
            first = state.document
            if stop > first:
                yield _Segment(block.tokens, starts[first:stop].tolist(), ends[first:stop].tolist(), state)
                state = state._replace(document=stop, documents=state.documents + stop - first)
            if stop < len(block):
                state = self._pass_unusable(unit, state, *block.unusable(permuted[stop]))
        return state
