"""A virtual stream of token shards: the rows and positions of :class:`Stream`, many documents at a time."""

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


class _Run(NamedTuple):
    """Usable documents that come one after another, without an unusable one between them."""

    tokens: npt.NDArray[Any]
    """Those of the shard."""
    starts: list[int]
    ends: list[int]
    """Where each document lies in the tokens, its eos included."""
    state: StreamState
    """Position of the first."""


class TokenStream(StreamBase[_Run]):
    """One virtual stream of token shards.

    Documents are copied from the memory map straight into the rows, and a position is made once for each
    :meth:`take`: that of :class:`Stream` takes longer for a document than copying it does.

    Args:
        settings: What all streams have in common.
        corpus: The token shards.
        number: Which of the streams this is.
        state: Where to start.
    """

    def __init__(self, settings: StreamSettings, corpus: TokenCorpus, number: int, state: StreamState) -> None:
        super().__init__(settings, corpus, number, state)
        self._runs = self._pieces(state._replace(token=0))
        self._run: _Run | None = None
        self._at = 0  # the document of the run with which the next row begins, or the number of all
        self._offset = state.token

    def take(self, count: int) -> TokenIds:
        """The next rows, see :class:`StreamBase`."""
        rows = self._pad(count) if self._settings.batching == "pad" else self._pack(count)
        assert self._run is not None
        first = self._run.state
        self.state = first._replace(
            rows=self.state.rows + count,
            document=first.document + self._at,
            documents=first.documents + self._at,
            token=self._offset,
        )
        return rows

    def _pad(self, count: int) -> TokenIds:
        """What :func:`sltrain_dist.data.stream.rows.pad_rows` makes of the next documents."""
        seq_len = self._settings.seq_len
        rows = np.full((count, seq_len + 1), PADDING, dtype=np.int32)
        filled = 0
        while filled < count:
            run = self._current()
            stop = min(self._at + count - filled, len(run.starts))
            spans = zip(run.starts[self._at : stop], run.ends[self._at : stop], strict=True)
            for row, (start, end) in zip(rows[filled:], spans, strict=False):
                length = min(end - start, seq_len)
                row[:length] = run.tokens[start : start + length]
                if self._settings.truncate == "eos":
                    row[length - 1] = run.tokens[end - 1]
            filled += stop - self._at
            self.documents_read += stop - self._at
            self._at = stop
        return rows

    def _pack(self, count: int) -> TokenIds:
        """What :func:`sltrain_dist.data.stream.rows.pack_rows` makes from the current token on.

        A row's last token is the next row's first, so that the position stays at the last one.
        """
        seq_len = self._settings.seq_len
        tokens = np.empty(count * seq_len + 1, dtype=np.int32)
        filled = 0
        while True:
            if self._run is None or self._at == len(self._run.starts):
                self.documents_read += 1
            run = self._current()
            start = run.starts[self._at] + self._offset
            length = min(run.ends[self._at] - start, len(tokens) - filled)
            tokens[filled : filled + length] = run.tokens[start : start + length]
            if self._settings.mark and self._offset == 0:
                tokens[filled] |= BEGIN
            filled += length
            if filled == len(tokens):
                self._offset += length - 1
                break
            self._at += 1
            self._offset = 0
            if self._at < len(run.starts):
                self.documents_read += 1
        rows = np.empty((count, seq_len + 1), dtype=np.int32)
        rows[:, :-1] = tokens[:-1].reshape(count, seq_len)
        rows[:, -1] = tokens[seq_len::seq_len]
        return rows

    def _current(self) -> _Run:
        """The run in which the next document is."""
        if self._run is None or self._at == len(self._run.starts):
            self._run = next(self._runs)
            self._at = 0
        return self._run

    def _block(self, unit: order.Unit, state: StreamState, block: Block) -> Generator[_Run, None, StreamState]:
        assert isinstance(block, TokenBlock)
        permuted = order.block_permutation(self._settings.seed, state.epoch, unit, state.block, len(block))
        starts, ends = block.spans(permuted)
        unusable = np.flatnonzero(starts == ends).tolist()
        for stop in [*(index for index in unusable if index >= state.document), len(block)]:
            first = state.document
            if stop > first:
                yield _Run(block.tokens, starts[first:stop].tolist(), ends[first:stop].tolist(), state)
                state = state._replace(document=stop, documents=state.documents + stop - first)
            if stop < len(block):
                state = self._pass_unusable(unit, state, *block.unusable(permuted[stop]))
        return state
