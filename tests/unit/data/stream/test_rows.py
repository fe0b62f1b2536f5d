"""Documents become rows: nothing lost, nothing doubled, any place can be gone on from."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sltrain_dist.data.stream.rows import BEGIN, PADDING, count_labels, count_tokens, make_rows, pack_rows, pad_rows

EOS = 1
documents_strategy = st.lists(
    st.lists(st.integers(2, 99), min_size=1, max_size=40).map(lambda ids: np.array(ids, dtype=np.int32)), max_size=12
)


def test_pad_rows():
    documents = [np.arange(2, 2 + length, dtype=np.int32) for length in (1, 3, 4, 9)]
    rows = list(pad_rows(documents, seq_len=4, eos_id=EOS))
    assert np.array_equal(
        [row.tokens for row in rows],
        [[2, 1, -1, -1, -1], [2, 3, 4, 1, -1], [2, 3, 4, 5, -1], [2, 3, 4, 5, -1]],
    )
    assert [(row.finished, row.offset) for row in rows] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert all(row.tokens.dtype == np.int32 for row in rows)
    assert count_tokens(np.stack([row.tokens for row in rows])) == 2 + 4 + 4 + 4


def test_a_row_that_is_cut_ends_with_eos_where_that_is_asked_for():
    documents = [np.arange(2, 2 + length, dtype=np.int32) for length in (1, 3, 4, 9)]
    rows = list(make_rows(documents, "pad", seq_len=4, eos_id=EOS, truncate="eos"))
    assert np.array_equal(
        [row.tokens for row in rows],
        [[2, 1, -1, -1, -1], [2, 3, 4, 1, -1], [2, 3, 4, 1, -1], [2, 3, 4, 1, -1]],
    )


@given(documents_strategy, st.integers(2, 17))
def test_pack_predicts_every_token_once(documents, seq_len):
    rows = [row.tokens for row in pack_rows(documents, seq_len=seq_len, eos_id=EOS, rest=True)]
    text = [int(token) for ids in documents for token in [*ids, EOS]]
    assert [int(token) for row in rows for token in row[1:] if token != PADDING] == text[1:]
    inputs = [int(token) for row in rows for token in row[:-1] if token != PADDING]
    assert inputs in (text, text[:-1])  # the last token is no input where it only ends a full row
    assert all(row.shape == (seq_len + 1,) and row.dtype == np.int32 for row in rows)
    assert all(PADDING not in row for row in rows[:-1])
    if rows:
        assert count_tokens(np.stack(rows)) == len(inputs)


@given(documents_strategy, st.integers(2, 17))
def test_pack_goes_on_from_every_row(documents, seq_len):
    whole = list(pack_rows(documents, seq_len=seq_len, eos_id=EOS, mark=True))
    for index, row in enumerate(whole):
        rest = pack_rows(documents[row.finished :], seq_len=seq_len, eos_id=EOS, offset=row.offset, mark=True)
        expected = [later.tokens for later in whole[index + 1 :]]
        assert np.array_equal([later.tokens for later in rest], expected)


@given(documents_strategy.map(lambda documents: [np.append(EOS, ids) for ids in documents]), st.integers(2, 17))
def test_marks_are_where_documents_begin(documents, seq_len):
    """Also where their text holds eos, and where a row begins with the token that ends the row before."""
    settings = {"seq_len": seq_len, "eos_id": EOS, "rest": True}
    plain = [row.tokens for row in pack_rows(documents, **settings)]
    marked = [row.tokens for row in pack_rows(documents, **settings, mark=True)]
    assert [np.where(row >= BEGIN, row - BEGIN, row).tolist() for row in marked] == [row.tolist() for row in plain]
    begins = [index == 0 for ids in documents for index in range(len(ids) + 1)]
    for number, row in enumerate(marked):
        shown = begins[number * seq_len : (number + 1) * seq_len + 1]
        assert (row >= BEGIN).tolist()[: len(shown)] == shown
        assert count_labels(row) == shown[1:].count(False)


def test_documents_are_taken_as_needed():
    taken = []

    def documents():
        for number in range(100):
            taken.append(number)
            yield np.full(3, number + 2, dtype=np.int32)

    rows = make_rows(documents(), "pack", seq_len=7, eos_id=EOS)
    next(rows)
    assert taken == [0, 1]
    next(rows)
    assert taken == [0, 1, 2, 3]
