"""From 1 to 128 ranks, with any workers: the same global batches, also after two resumes on other ranks."""

import numpy as np
import pytest

from sltrain_dist.data import loader as loader_module
from sltrain_dist.data import order
from sltrain_dist.data.stream.stream_group import StreamGroup
from sltrain_dist.data.stream.virtual_stream import StreamState
from sltrain_dist.numerics.splitmix import integers
from tests.support.data import (
    BATCHINGS,
    NumberTokenizer,
    data_config,
    global_batches,
    make_loaders,
    saved,
    settings,
    write_numbered,
)


@pytest.fixture
def shards(tmp_path):
    return write_numbered(tmp_path, [40, 25, 60, 20, 30], lambda number: number % 19 + 1)


class SimulatedRank:
    """A rank with worker processes, without the processes: the same shares in the same groups."""

    def __init__(self, config, global_batch, rank, world_size, workers, states):
        shares = order.rank_shares(rank, world_size, global_batch, config.streams)
        self.groups = [
            StreamGroup(config, NumberTokenizer(), some, states)
            for some in loader_module._contiguous_parts(shares, workers)
        ]

    def update(self):
        updates = [group.next_update() for group in self.groups]
        states = {stream: state for update in updates for stream, state in update.states.items()}
        return np.concatenate([update.rows for update in updates]), states


def run(config, global_batch, world_size, workers, states, updates):
    """Global batches, and the positions after them, on which all ranks must agree."""
    ranks = [SimulatedRank(config, global_batch, rank, world_size, workers, states) for rank in range(world_size)]
    batches = []
    for _ in range(updates):
        results = [rank.update() for rank in ranks]
        batches.append(np.concatenate([rows for rows, _ in results]))
        after = {}
        for _, positions in results:
            for stream, position in positions.items():
                assert after.setdefault(stream, position) == position
    assert sorted(after) == list(range(config.streams))
    return batches, after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("global_batch", "streams", "batching"),
    [(128, 12, "pack"), (128, 32, "pad"), (96, 7, "pad"), (96, 96, "pack")],
)
def test_one_to_128_ranks_with_two_resumes(shards, global_batch, streams, batching):
    """Three parts, on three numbers of ranks each; numbers of ranks, workers and updates are drawn."""
    config = settings(shards, streams=streams, batching=batching)
    start = {stream: StreamState() for stream in range(streams)}
    divisors = [ranks for ranks in range(1, 129) if global_batch % ranks == 0]
    expected, _ = run(config, global_batch, 1, 1, start, 6)
    draws = iter(integers(streams, 0, 1000, 1000).tolist())
    for index in range(len(divisors)):
        states, done = start, 0
        for part in range(3):
            ranks = divisors[index] if part == 0 else divisors[next(draws) % len(divisors)]
            updates = 1 + next(draws) % 2
            batches, states = run(config, global_batch, ranks, 1 + next(draws) % 7, states, updates)
            assert all(map(np.array_equal, batches, expected[done : done + updates]))
            done += updates
            assert {state.rows for state in states.values()} <= {
                done * (global_batch // streams),
                done * -(-global_batch // streams),
            }


@pytest.mark.parametrize("world_size", range(1, 129))
def test_every_rank_count_deals_every_row_once(world_size):
    """All of 1 to 128, with a global batch that each divides, and numbers of streams of all kinds."""
    global_batch = world_size * 3
    for wanted in (1, 7, 16, 128, 500):
        streams = order.num_streams(wanted, global_batch)
        rows = []
        for rank in range(world_size):
            shares = order.rank_shares(rank, world_size, global_batch, streams)
            rows += [(share.stream, row) for share in shares for row in range(share.begin, share.end)]
            for workers in (1, 2, 5):
                groups = loader_module._contiguous_parts(shares, workers)
                assert [share for group in groups for share in group] == shares
        assert len(rows) == global_batch
        assert rows == sorted(set(rows))


@pytest.mark.parametrize("batching", list(BATCHINGS))
def test_ranks_1_2_4_3(shards, batching, monkeypatch):
    """The loader itself, through a cursor as it is saved, with two epochs' worth of documents."""
    monkeypatch.setattr(loader_module, "Tokenizer", NumberTokenizer)

    config = data_config(**BATCHINGS[batching], streams=8)
    expected = global_batches(make_loaders(config, shards, 1), 60)
    state, done = None, 0
    for world_size, updates in ((1, 13), (2, 11), (4, 17), (3, 19)):
        loaders = make_loaders(config, shards, world_size, state=state)
        assert np.array_equal(global_batches(loaders, updates), expected[done : done + updates])
        state, done = saved(loaders), done + updates
    assert done == 60
