"""Sources with weights: shares of the rows as asked, every document once an epoch of its source, elastic."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltrain_dist.config.load import build_config
from sltrain_dist.data import loader as loader_module
from sltrain_dist.data import order
from sltrain_dist.errors import CheckpointError, ConfigError
from tests.support.data import (
    NumberTokenizer,
    data_config,
    global_batches,
    make_loaders,
    saved,
    write_numbered,
)

SIZES = [3, 2, 1]
WEIGHTS = [6.0, 3.0, 1.0]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Three sources of 90, 60 and 30 documents, numbered through."""
    monkeypatch.setattr(loader_module, "Tokenizer", NumberTokenizer)
    return write_numbered(tmp_path, [30] * 6, lambda number: number % 7 + 1)


def mixed(shards, world_size, *, state=None, weights=WEIGHTS, **changes):
    """Loaders of the three sources."""
    config = data_config(**{"streams": 20, "source": ["a", "b", "c"], "weights": weights, **changes})
    return make_loaders(config, shards, world_size, global_batch=40, state=state, source_sizes=SIZES)


def source_of(documents):
    return np.searchsorted([90, 150, 180], documents)


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_every_update_has_the_shares(shards, batching):
    batches = global_batches(mixed(shards, 1, batching=batching, seq_len=2), 30)
    tokens = batches[:, :, 0]
    if batching == "pack":  # zeros end documents
        tokens = np.where(tokens == 0, batches[:, :, 1], tokens)
    for update in tokens:
        assert np.bincount(source_of(update)).tolist() == [24, 12, 4]


def test_each_source_gives_every_document_before_any_again(shards):
    first = global_batches(mixed(shards, 1), 100)[..., 0]
    for source, size, first_epoch in ((0, 90, 2), (1, 60, 4), (2, 30, 6)):
        seen = Counter(first[source_of(first) == source].tolist())
        assert len(seen) == size
        early = Counter(first[:first_epoch][source_of(first[:first_epoch]) == source].tolist())
        assert max(early.values()) == 1


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_any_number_of_ranks_and_resume(shards, batching):
    expected = global_batches(mixed(shards, 1, batching=batching), 16)
    state, done = None, 0
    for world_size, updates in ((1, 3), (2, 5), (8, 1), (5, 7)):
        loaders = mixed(shards, world_size, state=state, batching=batching)
        assert np.array_equal(global_batches(loaders, updates), expected[done : done + updates])
        state, done = saved(loaders), done + updates


def test_weights_are_part_of_the_order(shards):
    state = saved(mixed(shards, 1))
    with pytest.raises(CheckpointError, match=r"data\.weights \('0\.6 of 3 files, .*, now '0\.5 of 3 files"):
        mixed(shards, 1, state=state, weights=[5.0, 4.0, 1.0])
    mixed(shards, 1, state=state, weights=[0.6, 0.3, 0.1])  # only their ratio matters


def test_weights_that_streams_cannot_hold(shards):
    with pytest.raises(ConfigError, match=r"\[0\.6, 0\.3, 0\.1\], but 6 streams give .* of the 40 rows.*data\.streams"):
        mixed(shards, 1, streams=6)
    with pytest.raises(ConfigError, match=r"but 20 streams give \[.*0\.0\]"):
        mixed(shards, 1, weights=[1.0, 1.0, 1e-6])


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    streams=st.integers(1, 200),
    rows_per_stream=st.integers(1, 4),
)
def test_streams_are_dealt_by_weight(weights, streams, rows_per_stream):
    dealt = order.deal_streams(weights, streams)
    assert dealt == order.deal_streams(weights, streams + 7)[:streams]
    for source, weight in enumerate(weights):
        assert abs(dealt.count(source) - streams * weight / sum(weights)) <= len(weights)
    shares = order.source_shares(dealt, len(weights), streams * rows_per_stream)
    assert shares == pytest.approx([dealt.count(source) / streams for source in range(len(weights))])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "x", "weights": [1.0]}, "needs a list of sources"),
        ({"source": ["x", "y"], "weights": [1.0]}, "has 1 entries for 2 data.source"),
        ({"source": ["x", "y"], "weights": [1.0, 0.0]}, "greater than 0"),
    ],
)
def test_impossible_weights(data, message):
    with pytest.raises(ConfigError, match=message):
        build_config({"run_dir": "r", "train": {"steps": 1}, "data": data})
