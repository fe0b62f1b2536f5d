"""The order of documents: a pure function of the seed, the epoch and the position.

The source is a list of S shards (files of documents). Its documents are distributed over V virtual streams,
and every update takes a fixed number of rows from every stream, so neither the number of ranks nor the
number of worker processes influences a batch. In epoch e of a stream::

    shards        0 1 2 3 ...                     permuted with a key of (seed, e)
      └ units     (shard, part) ...               every shard split in `parts`, so that all streams have work
          └ stream v takes units v, v + V, ...    part p of a shard: its documents p, p + parts, ...
              └ blocks of `shuffle_block` documents, each permuted with a key of (seed, e, shard, part, block)

Each document of the source is in exactly one unit, hence read exactly once per epoch. Each stream
starts its next epoch on its own: no stream waits for another.

With several weighted sources, every stream reads one of them, and the above holds for each source and its streams.

Random numbers come from :mod:`sltrain_dist.numerics.splitmix`, so no library release can change them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sltrain_dist.numerics.splitmix import first_word, permutation

_MASK = (1 << 64) - 1


class _Purpose(IntEnum):
    """First word of a key, so that different uses of the same seed get different random numbers."""

    SHARDS = 1
    BLOCK = 2


class Unit(NamedTuple):
    """The documents `part`, `part + parts`, `part + 2·parts`, … of one shard."""

    shard: int
    part: int
    parts: int


class StreamShare(NamedTuple):
    """The rows of one stream that a rank keeps in every update.

    The stream always advances by `rows`; of these, the rank keeps rows `begin` to `end` (exclusive).
    """

    stream: int
    rows: int
    begin: int
    end: int


def num_streams(streams: int, global_batch: int) -> int:
    """Returns the number of virtual streams V: at most one per row of an update, as each must give at least one."""
    return min(streams, global_batch)


def deal_streams(weights: Sequence[float], streams: int) -> list[int]:
    """Returns the source that each stream reads, so that sources get rows in proportion to their weights.

    Each stream gets the source that is furthest behind its share, as in Bresenham's algorithm;
    hence any consecutive streams match the weights as closely as whole streams can.

    Args:
        weights: One positive weight per source; they need not sum to 1.
        streams: Number of virtual streams V.
    """
    total = sum(weights)
    counts = [0] * len(weights)
    sources = []
    for number in range(1, streams + 1):
        source = max(range(len(weights)), key=lambda s: (weights[s] * number / total - counts[s], -s))
        counts[source] += 1
        sources.append(source)
    return sources


def source_shares(stream_sources: Sequence[int], num_sources: int, global_batch: int) -> list[float]:
    """Returns the share of an update's rows that each source gets, given the source of each stream."""
    streams = len(stream_sources)
    rows = [0] * num_sources
    for stream, source in enumerate(stream_sources):
        rows[source] += _first_row(stream + 1, global_batch, streams) - _first_row(stream, global_batch, streams)
    return [count / global_batch for count in rows]


def rank_shares(rank: int, world_size: int, global_batch: int, streams: int) -> list[StreamShare]:
    """Returns the streams that rank `rank` reads, in the order of its rows.

    The rows of an update are ordered by (stream, row of the stream), and every rank takes an equal contiguous
    part, so ranks may share a stream if their number does not divide the number of streams.

    Args:
        rank: In 0 … world_size − 1.
        world_size: Number of ranks N; divides `global_batch`.
        global_batch: Rows of an update G, over all ranks.
        streams: Number of virtual streams V, at most G.
    """
    if global_batch % world_size or not 0 <= rank < world_size or streams > global_batch:
        raise ValueError(f"no share for rank {rank} of {world_size}: {global_batch} rows from {streams} streams")
    rows_per_rank = global_batch // world_size
    first, last = rank * rows_per_rank, (rank + 1) * rows_per_rank
    shares = []
    stream = bisect_right(range(streams), first, key=lambda s: _first_row(s, global_batch, streams)) - 1
    while (start := _first_row(stream, global_batch, streams)) < last:
        stop = _first_row(stream + 1, global_batch, streams)
        shares.append(StreamShare(stream, stop - start, max(start, first) - start, min(stop, last) - start))
        stream += 1
    return shares


def stream_units(seed: int, epoch: int, num_shards: int, streams: int, stream: int) -> list[Unit]:
    """Returns the units that `stream` reads in its epoch `epoch`, in order. Never empty."""
    parts = -(-streams // num_shards)
    shards = permutation(_key(_Purpose.SHARDS, seed, epoch), num_shards)
    return [
        Unit(int(shards[index // parts]), index % parts, parts) for index in range(stream, num_shards * parts, streams)
    ]


def block_permutation(seed: int, epoch: int, unit: Unit, block: int, size: int) -> npt.NDArray[np.int64]:
    """Returns the order in which the `size` documents of a unit's block are read, of shape (size,)."""
    return permutation(_key(_Purpose.BLOCK, seed, epoch, unit.shard, unit.part, block), size)


def _first_row(stream: int, global_batch: int, streams: int) -> int:
    """Returns the index in the update of the stream's first row; the first G % V streams have one row more."""
    return stream * (global_batch // streams) + min(stream, global_batch % streams)


def _key(*words: int) -> int:
    state = 0
    for word in words:
        state = first_word((state + word) & _MASK)
    return state
