"""Documents become rows: nothing lost, nothing doubled, any place can be gone on from."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sltrain_dist.data.stream.rows import (
    PADDING,
    RowMaker,
    Segment,
    count_labels,
    count_tokens,
    mark_first_tokens,
    split_marks,
)

EOS = 1
documents_strategy = st.lists(
    st.lists(st.integers(2, 99), min_size=1, max_size=40).map(lambda ids: np.array(ids, dtype=np.int32)), max_size=12
)


def segments(documents, size=1):
    """Segments of up to `size` documents, which lie in their array in reverse order, with foreign tokens between."""
    for first in range(0, len(documents), size):
        tokens, starts, ends = [], [], []
        for ids in reversed(documents[first : first + size]):
            tokens += [77, *ids, EOS]
            starts.insert(0, len(tokens) - len(ids) - 1)
            ends.insert(0, len(tokens))
        yield Segment(np.array(tokens, dtype=np.uint16), starts, ends)


def all_rows(documents, batching="pack", *, seq_len, size=1, **settings):
    """All rows, taken one at a time."""
    maker = RowMaker(segments(documents, size), batching, seq_len=seq_len, **settings)
    rows = list(iter(lambda: maker.take(1).tolist(), []))
    return np.array([row for (row,) in rows], dtype=np.int32).reshape(-1, seq_len + 1)


def plain_rows(documents, batching, seq_len, truncate="text"):
    """The same rows, as one would write them down, and for each the number of finished documents and the offset in the
    next."""
    rows = []
    if batching == "pad":
        for finished, ids in enumerate(documents, start=1):
            row = [*ids, EOS][:seq_len]
            row[-1] = EOS if truncate == "eos" else row[-1]
            rows.append((row, finished, 0))
    else:
        places = [(n, index) for n, ids in enumerate(documents) for index in range(len(ids) + 1)]
        text = [token for ids in documents for token in [*ids, EOS]]
        for start in range(0, len(text) - 1, seq_len):
            end = start + seq_len
            rows.append((text[start : end + 1], *(places[end] if end < len(text) else (len(documents), 0))))
    return [(row + [PADDING] * (seq_len + 1 - len(row)), *place) for row, *place in rows]


@pytest.mark.parametrize("size", [1, 3])
def test_pad_rows(size):
    documents = [np.arange(2, 2 + length, dtype=np.int32) for length in (1, 3, 4, 9)]
    rows = all_rows(documents, "pad", seq_len=4, size=size)
    assert np.array_equal(rows, [[2, 1, -1, -1, -1], [2, 3, 4, 1, -1], [2, 3, 4, 5, -1], [2, 3, 4, 5, -1]])
    assert count_tokens(rows) == 2 + 4 + 4 + 4


@pytest.mark.parametrize("size", [1, 3])
def test_a_row_that_is_cut_ends_with_eos_where_that_is_asked_for(size):
    documents = [np.arange(2, 2 + length, dtype=np.int32) for length in (1, 3, 4, 9)]
    rows = all_rows(documents, "pad", seq_len=4, size=size, truncate="eos")
    assert np.array_equal(rows, [[2, 1, -1, -1, -1], [2, 3, 4, 1, -1], [2, 3, 4, 1, -1], [2, 3, 4, 1, -1]])


@given(
    documents_strategy,
    st.integers(1, 5),
    st.integers(2, 17),
    st.sampled_from([("pad", "text"), ("pad", "eos"), ("pack", "text")]),
    st.lists(st.integers(1, 5), min_size=1),
)
def test_any_number_of_rows_at_a_time(documents, size, seq_len, form, counts):
    """Rows, positions and numbers of documents, from segments of any size."""
    batching, truncate = form
    requested = []

    def noted():
        for segment in segments(documents, size):
            requested.append(segment)
            yield segment

    maker = RowMaker(noted(), batching, seq_len=seq_len, truncate=truncate)
    expected = plain_rows(documents, batching, seq_len, truncate)
    done = 0
    while done < len(expected):
        count = counts[done % len(counts)]
        rows = maker.take(count)
        due = expected[done : done + count]
        assert rows.dtype == np.int32
        assert rows.tolist() == [row for row, _, _ in due]
        done += len(due)
        if done < len(expected):
            _, finished, offset = due[-1]
            assert size * (len(requested) - 1) + maker.index == finished
            assert maker.offset == offset
            assert maker.documents_begun == finished + (batching == "pack")
    assert maker.take(2).shape == (0, seq_len + 1)
    assert maker.documents_begun == len(documents)


@given(documents_strategy, st.integers(2, 17))
def test_pack_predicts_every_token_once(documents, seq_len):
    rows = all_rows(documents, seq_len=seq_len)
    text = [int(token) for ids in documents for token in [*ids, EOS]]
    assert [int(token) for row in rows for token in row[1:] if token != PADDING] == text[1:]
    inputs = [int(token) for row in rows for token in row[:-1] if token != PADDING]
    assert inputs in (text, text[:-1])  # the last token is no input where it only ends a full row
    assert all(PADDING not in row for row in rows[:-1])
    assert count_tokens(rows) == len(inputs)


@given(documents_strategy, st.integers(2, 17))
def test_pack_goes_on_from_every_row(documents, seq_len):
    whole = all_rows(documents, seq_len=seq_len, mark=True)
    for index, (_, finished, offset) in enumerate(plain_rows(documents, "pack", seq_len), start=1):
        rest = all_rows(documents[finished:], seq_len=seq_len, offset=offset, mark=True)
        assert np.array_equal(rest, whole[index:])


@given(documents_strategy.map(lambda documents: [np.append(EOS, ids) for ids in documents]), st.integers(2, 17))
def test_marks_are_where_documents_begin(documents, seq_len):
    """Also where their text holds eos, and where a row begins with the token that ends the row before."""
    plain = all_rows(documents, seq_len=seq_len)
    marked = all_rows(documents, seq_len=seq_len, mark=True)
    ids, begin = split_marks(marked)
    assert np.array_equal(ids, plain)
    begins = [index == 0 for ids in documents for index in range(len(ids) + 1)]
    for number, row in enumerate(marked):
        shown = begins[number * seq_len : (number + 1) * seq_len + 1]
        assert begin[number].tolist()[: len(shown)] == shown
        assert count_labels(row) == shown[1:].count(False)


@pytest.mark.parametrize("library", [np, torch])
def test_marks_are_split_from_ids_of_any_size(library):
    """Marked rows stay int32, and padding has no mark."""
    ids = [[0, 5, (1 << 30) - 1], [3, PADDING, PADDING]]
    rows = library.asarray(ids, dtype=library.int32)
    mark_first_tokens(rows, ([0, 0, 1], [0, 2, 0]))
    assert rows.dtype == library.int32
    split, begins = split_marks(rows)
    assert split.dtype == library.int64
    assert split.tolist() == ids
    assert begins.tolist() == [[True, False, True], [True, False, False]]


def test_documents_are_taken_as_needed():
    taken = []

    def documents():
        for number in range(100):
            taken.append(number)
            yield from segments([np.full(3, number + 2, dtype=np.int32)])

    maker = RowMaker(documents(), "pack", seq_len=7)
    maker.take(1)
    assert taken == [0, 1]
    maker.take(1)
    assert taken == [0, 1, 2, 3]
