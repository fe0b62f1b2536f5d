"""The order of documents is a pure function, and deals every document exactly once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltrain_dist.data import order
from sltrain_dist.numerics.splitmix import first_word, permutation, splitmix64


def test_order_is_frozen():
    """Published values: a change of these silently reorders the data of every run that resumes."""
    assert permutation(42, 8).tolist() == [4, 1, 6, 2, 3, 0, 7, 5]
    assert order.stream_units(0, 1, 3, 4, 1) == [order.Unit(2, 1, 2), order.Unit(0, 1, 2)]
    assert order.block_permutation(7, 2, order.Unit(5, 1, 2), 3, 6).tolist() == [3, 0, 2, 4, 5, 1]


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_permutation_is_splitmix64(size, key):
    def splitmix64(state):
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    keys = [splitmix64((key + 0x9E3779B97F4A7C15 * (i + 1)) % 2**64) for i in range(size)]
    assert permutation(key, size).tolist() == sorted(range(size), key=keys.__getitem__)


def test_splitmix64_reference_values():
    """The first outputs for seed 1234567 of the reference implementation (Vigna's splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    gamma = 0x9E3779B97F4A7C15
    keys = [(1234567 + gamma * i) % 2**64 for i in range(3)]
    assert [int(splitmix64(key, 0, 1)[0]) for key in keys] == [first_word(key) for key in keys] == expected


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(order._key(2, seed), 4).tolist()) for seed in range(24 * 400))
    chi_square = sum((count - 400) ** 2 / 400 for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001


@given(
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 5),
    num_shards=st.integers(1, 40),
    streams=st.integers(1, 40),
    documents=st.integers(0, 60),
)
def test_units_cover_every_document_once(seed, epoch, num_shards, streams, documents):
    units = [order.stream_units(seed, epoch, num_shards, streams, stream) for stream in range(streams)]
    assert all(units)
    assert max(map(len, units)) - min(map(len, units)) <= 1
    read = Counter((unit.shard, i) for each in units for unit in each for i in range(unit.part, documents, unit.parts))
    assert read == Counter((shard, i) for shard in range(num_shards) for i in range(documents))


def test_epochs_and_seeds_differ():
    orders = {tuple(order.stream_units(seed, epoch, 50, 1, 0)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    unit = order.Unit(0, 0, 1)
    others = [order.Unit(1, 0, 1), order.Unit(0, 1, 1)]
    base = order.block_permutation(0, 0, unit, 0, 50)
    for changed in [(1, 0, unit, 0), (0, 1, unit, 0), (0, 0, unit, 1), *((0, 0, other, 0) for other in others)]:
        assert not np.array_equal(base, order.block_permutation(*changed, 50))


@given(st.data(), st.integers(1, 32), st.integers(1, 8), st.integers(1, 80))
def test_ranks_share_an_update(data, world_size, rows_per_rank, wanted_streams):
    global_batch = world_size * rows_per_rank
    streams = order.num_streams(wanted_streams, global_batch)
    rows = [
        (share.stream, row)
        for rank in range(world_size)
        for share in order.rank_shares(rank, world_size, global_batch, streams)
        for row in range(share.begin, share.end)
    ]
    sizes = {
        s.stream: s.rows for r in range(world_size) for s in order.rank_shares(r, world_size, global_batch, streams)
    }
    assert rows == [(stream, row) for stream in range(streams) for row in range(sizes[stream])]
    assert len(rows) == global_batch
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_streams_are_private_where_they_are_a_multiple_of_the_ranks():
    for rank in range(4):
        shares = order.rank_shares(rank, 4, 32, 8)
        assert [share.stream for share in shares] == [2 * rank, 2 * rank + 1]
        assert all((share.begin, share.end) == (0, share.rows) for share in shares)


@pytest.mark.parametrize("arguments", [(0, 3, 8, 4), (4, 4, 8, 4), (-1, 4, 8, 4), (0, 4, 8, 9)])
def test_impossible_shares(arguments):
    with pytest.raises(ValueError, match="no share"):
        order.rank_shares(*arguments)
