"""Rows of tokens, padded or packed from documents.

A row is an int32 array of shape (seq_len + 1,): a model reads `row[:-1]` and predicts `row[1:]`.
:data:`PADDING` stands where there is no token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sltrain_dist.data.documents import TokenIds

PADDING = -1
"""Marks the absence of a token. Not a tokenizer's padding id: many have none, and others may occur in a text."""
BEGIN = 1 << 30
"""Bit that marks a document's first token; larger than any id. Eos cannot mark documents: a tokenizer may give it to a
text that spells it."""

Batching = Literal["pad", "pack"]
Truncate = Literal["text", "eos"]


class MadeRow(NamedTuple):
    """A row, and where the next one begins."""

    tokens: TokenIds
    """Shape (seq_len + 1,)."""
    finished: int
    """Number of documents, counted from the first, that no later row needs."""
    offset: int
    """Index of the next row's first token in the document after these, eos included."""


def make_rows(
    documents: Iterable[TokenIds],
    batching: Batching,
    *,
    seq_len: int,
    eos_id: int,
    truncate: Truncate = "text",
    offset: int = 0,
    rest: bool = False,
    mark: bool = False,
) -> Iterator[MadeRow]:
    """Yields rows made from documents.

    Args:
        documents: Token ids of each document, not empty. Consumed one at a time, as needed.
        batching: pad: one document per row, see :func:`pad_rows`. pack: see :func:`pack_rows`.
        seq_len: Number of tokens of a row that a model reads.
        eos_id: The token that ends a document.
        truncate: For pad: how a row ends if its document is too long, with text or eos.
        offset: For pack: index of the first token to use of the first document, a `MadeRow.offset` of an earlier call.
        rest: For pack: whether the remaining tokens make a last, padded row.
        mark: For pack: whether documents' first tokens carry :data:`BEGIN`.
    """
    if batching == "pad":
        return pad_rows(documents, seq_len=seq_len, eos_id=eos_id, truncate=truncate)
    return pack_rows(documents, seq_len=seq_len, eos_id=eos_id, offset=offset, rest=rest, mark=mark)


def pad_rows(
    documents: Iterable[TokenIds], *, seq_len: int, eos_id: int, truncate: Truncate = "text"
) -> Iterator[MadeRow]:
    """Yields one row for each document: its ids and eos, truncated or padded to `seq_len` tokens.

    A truncated row ends with the document's text or with eos, as `truncate` says. An extra last column of padding gives
    the row the shape of a packed one.
    """
    max_length = seq_len if truncate == "text" else seq_len - 1
    for finished, ids in enumerate(documents, start=1):
        row = np.full(seq_len + 1, PADDING, dtype=np.int32)
        length = min(len(ids), max_length)
        row[:length] = ids[:length]
        if length < seq_len:
            row[length] = eos_id
        yield MadeRow(row, finished, 0)


def pack_rows(
    documents: Iterable[TokenIds],
    *,
    seq_len: int,
    eos_id: int,
    offset: int = 0,
    rest: bool = False,
    mark: bool = False,
) -> Iterator[MadeRow]:
    """Yields rows of `seq_len + 1` tokens from the concatenated documents, each followed by eos.

    Each row starts with the last token of the row before, so that every token except the very first is
    predicted exactly once.
    """
    row = np.full(seq_len + 1, PADDING, dtype=np.int32)
    filled = 0
    for finished, ids in enumerate(documents):
        tokens = np.append(ids, np.int32(eos_id))
        if mark:
            tokens[0] |= BEGIN
        while offset < len(tokens):
            piece = tokens[offset : offset + seq_len + 1 - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            offset += len(piece)
            if filled <= seq_len:
                break
            yield MadeRow(row, finished, offset - 1)
            row = np.full(seq_len + 1, PADDING, dtype=np.int32)
            row[0], filled = tokens[offset - 1], 1
        offset = 0
    if rest and filled > 1:
        yield MadeRow(row, finished + 1, 0)


def count_tokens(rows: npt.NDArray[np.int32]) -> int:
    """Counts the tokens that a model reads in `rows`, of shape (…, seq_len + 1): no padding, not the last column."""
    return int(np.count_nonzero(rows[..., :-1] != PADDING))


def count_labels(rows: npt.NDArray[np.int32]) -> int:
    """Counts the tokens that a model predicts in `rows`, of shape (…, seq_len + 1).

    Padding does not count, nor a token with :data:`BEGIN`: its document has no earlier token to predict it from.
    """
    targets = rows[..., 1:]
    return int(np.count_nonzero((targets >= 0) & (targets < BEGIN)))
