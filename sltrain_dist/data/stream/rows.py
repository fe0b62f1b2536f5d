"""Rows of tokens, padded or packed from documents.

A row is an int32 array of shape (seq_len + 1,): a model reads `row[:-1]` and predicts `row[1:]`.
:data:`PADDING` stands where there is no token. Documents' first tokens may be marked. A mark is stored in the token's
id; :func:`split_marks` separates the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sltrain_dist.data.documents import TokenIds

PADDING = -1
"""Marks the absence of a token. Not a tokenizer's padding id: many have none, and others may occur in a text."""
_MARK = 1 << 30
"""Bit of a marked token; larger than any id. Eos cannot mark documents: a tokenizer may give it to a text that spells
it."""

Batching = Literal["pad", "pack"]
Truncate = Literal["text", "eos"]


class Segment(NamedTuple):
    """Consecutive documents."""

    tokens: npt.NDArray[Any]
    """Token ids, also of other documents."""
    starts: list[int]
    ends: list[int]
    """Begin and end of each document in the tokens, its eos included."""

    def documents(self) -> Iterator[Segment]:
        """Yields each document as a segment of its own."""
        for start, end in zip(self.starts, self.ends, strict=True):
            yield Segment(self.tokens, [start], [end])


class RowMaker:
    """Makes rows of documents, and keeps the position of the next row.

    pad: A row is one document, truncated or padded to `seq_len` tokens. An extra last column of padding gives it the
    shape of a packed row.

    pack: Rows are cut from the concatenated documents. Each row starts with the last token of the row before, so that
    every token except the very first is predicted exactly once. The last row is padded.

    Args:
        segments: The documents. A segment is requested only when a row needs its first document.
        batching: pad or pack.
        seq_len: Number of tokens of a row that a model reads.
        truncate: For pad: how a row ends if its document is too long, with text or eos.
        offset: For pack: index of the first token to use of the first document.
        mark: For pack: whether documents' first tokens are marked.
    """

    def __init__(
        self,
        segments: Iterator[Segment],
        batching: Batching,
        *,
        seq_len: int,
        truncate: Truncate = "text",
        offset: int = 0,
        mark: bool = False,
    ) -> None:
        self.index = 0
        """The document in which the next row begins: its index in the segment that was requested last."""
        self.offset = offset
        """Index in this document of the next row's first token; always 0 for pad."""
        self.documents_begun = 0
        """Number of documents that are in a row, whole or in part."""
        self._segments = segments
        self._segment = _NO_DOCUMENTS
        self._batching = batching
        self._seq_len = seq_len
        self._truncate = truncate
        self._mark = mark

    def take(self, count: int) -> TokenIds:
        """Returns the next rows, shape (count, seq_len + 1); fewer if there are no more documents."""
        return self._pad(count) if self._batching == "pad" else self._pack(count)

    def _pad(self, count: int) -> TokenIds:
        rows = np.full((count, self._seq_len + 1), PADDING, dtype=np.int32)
        filled = 0
        while filled < count and (segment := self._current()).starts:
            stop = min(self.index + count - filled, len(segment.starts))
            spans = zip(segment.starts[self.index : stop], segment.ends[self.index : stop], strict=True)
            for row, (start, end) in zip(rows[filled:], spans, strict=False):
                length = min(end - start, self._seq_len)
                row[:length] = segment.tokens[start : start + length]
                if self._truncate == "eos":
                    row[length - 1] = segment.tokens[end - 1]
            filled += stop - self.index
            self.documents_begun += stop - self.index
            self.index = stop
        return rows[:filled]

    def _pack(self, count: int) -> TokenIds:
        seq_len = self._seq_len
        tokens = np.full(count * seq_len + 1, PADDING, dtype=np.int32)
        filled = 0
        while filled < len(tokens) and (segment := self._current()).starts:
            if filled or not self.documents_begun:  # else the first tokens belong to the last row's document
                self.documents_begun += 1
            start = segment.starts[self.index] + self.offset
            length = min(segment.ends[self.index] - start, len(tokens) - filled)
            tokens[filled : filled + length] = segment.tokens[start : start + length]
            if self._mark and self.offset == 0:
                tokens[filled] |= _MARK
            filled += length
            if filled < len(tokens):
                self.index, self.offset = self.index + 1, 0
            else:
                self.offset += length - 1  # the last token is the next row's first
        count = len(range(0, filled - 1, seq_len))
        rows = np.empty((count, seq_len + 1), dtype=np.int32)
        rows[:, :-1] = tokens[: count * seq_len].reshape(count, seq_len)
        rows[:, -1] = tokens[seq_len : count * seq_len + 1 : seq_len]
        return rows

    def _current(self) -> Segment:
        """Returns the segment that contains the next document, or one without documents after the last."""
        if self.index == len(self._segment.starts):
            self._segment, self.index = next(self._segments, _NO_DOCUMENTS), 0
        return self._segment


_NO_DOCUMENTS = Segment(np.empty(0, dtype=np.int32), [], [])


def mark_first_tokens(rows: Any, where: Any) -> None:
    """Marks tokens of rows (an integer array of numpy or torch) as documents' first, in place.

    Args:
        rows: Token ids, not marked yet.
        where: Index of the tokens, of any kind that the array accepts.
    """
    rows[where] |= _MARK


def split_marks(rows: Any) -> tuple[Any, Any]:
    """Returns the token ids without marks (int64) and whether each is marked (bool); for arrays of numpy or torch."""
    marked = rows >= _MARK
    return rows - marked * _MARK, marked


def count_tokens(rows: npt.NDArray[np.int32]) -> int:
    """Counts the tokens that a model reads in `rows`, of shape (…, seq_len + 1): no padding, not the last column."""
    return int(np.count_nonzero(rows[..., :-1] != PADDING))


def count_labels(rows: npt.NDArray[np.int32]) -> int:
    """Counts the tokens that a model predicts in `rows`, of shape (…, seq_len + 1).

    Padding does not count, nor a marked token: its document has no earlier token to predict it from.
    """
    targets = rows[..., 1:]
    return int(np.count_nonzero((targets >= 0) & (targets < _MARK)))
