"""From documents to rows.

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
"""No token. Not a tokenizer's padding id: many have none, and those of others may occur in a text."""
BEGIN = 1 << 30
"""Bit of a document's first token, where rows say where documents begin; larger than any id. They cannot be told from
eos: a tokenizer may give it to a text that spells it."""

Batching = Literal["pad", "pack"]
Truncate = Literal["text", "eos"]


class MadeRow(NamedTuple):
    """A row, and where the next one begins."""

    tokens: TokenIds
    """Shape (seq_len + 1,)."""
    finished: int
    """Number of documents that no later row needs, counted from the first."""
    offset: int
    """First token of the next row, within the document after these (whose last token is its eos)."""


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
    """The rows of some documents.

    Args:
        documents: Token ids of each document, not empty. Taken one at a time, as they are needed.
        batching: pad: one document a row, see :func:`pad_rows`. pack: see :func:`pack_rows`.
        seq_len: Tokens that a model reads of a row.
        eos_id: The token that ends a document.
        truncate: For pad: what ends a row that its document is too long for.
        offset: For pack: the first token to use of the first document; a `MadeRow.offset` of an earlier call.
        rest: For pack: whether what is left at the end makes a last, padded row.
        mark: For pack: whether documents' first tokens carry :data:`BEGIN`.
    """
    if batching == "pad":
        return pad_rows(documents, seq_len=seq_len, eos_id=eos_id, truncate=truncate)
    return pack_rows(documents, seq_len=seq_len, eos_id=eos_id, offset=offset, rest=rest, mark=mark)


def pad_rows(
    documents: Iterable[TokenIds], *, seq_len: int, eos_id: int, truncate: Truncate = "text"
) -> Iterator[MadeRow]:
    """One row for each document: its ids and eos, cut or padded to `seq_len` tokens.

    A row that is cut ends with the document's text, or with eos, as `truncate` says. The last column is padding too, so
    that the row has the shape of a packed one.
    """
    most = seq_len if truncate == "text" else seq_len - 1
    for finished, ids in enumerate(documents, start=1):
        row = np.full(seq_len + 1, PADDING, dtype=np.int32)
        length = min(len(ids), most)
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
    """Documents, each followed by eos, one after another; every row takes `seq_len + 1` tokens.

    The next row starts with the last token of the row before, so that every token but the very first is
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
    """Tokens that a model reads in `rows`, of shape (…, seq_len + 1): padding and the last column do not count."""
    return int(np.count_nonzero(rows[..., :-1] != PADDING))


def count_labels(rows: npt.NDArray[np.int32]) -> int:
    """Tokens that a model is to predict in `rows`, of shape (…, seq_len + 1).

    Not padding, nor a token with :data:`BEGIN`: nothing of its document comes before it.
    """
    targets = rows[..., 1:]
    return int(np.count_nonzero((targets >= 0) & (targets < BEGIN)))
