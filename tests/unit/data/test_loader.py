"""Every document once an epoch, the same global batches for any ranks, exact continuation, faults that stop."""

import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sltrain_dist.data import loader as loader_module
from sltrain_dist.data.loader import merge_states
from sltrain_dist.data.stream.rows import PADDING
from sltrain_dist.data.stream.stream_group import StreamGroup
from sltrain_dist.data.stream.virtual_stream import StreamState
from sltrain_dist.errors import CheckpointError, DataError
from tests.support.data import (
    BATCHINGS,
    NumberTokenizer,
    data_config,
    global_batches,
    make_loaders,
    saved,
    settings,
    text_stream,
    write_numbered,
    write_shard,
)

in_fixture = hypothesis_settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    monkeypatch.setattr(loader_module, "Tokenizer", NumberTokenizer)


def messages(error):
    return str(error.value)


@in_fixture
@given(
    num_shards=st.integers(1, 7),
    streams=st.integers(1, 9),
    extra=st.lists(st.integers(0, 23), min_size=7, max_size=7),
    block=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_every_document_once_an_epoch(tmp_path, num_shards, streams, extra, block, seed):
    parts = -(-streams // num_shards)
    shards = write_numbered(tmp_path, [parts + more for more in extra[:num_shards]])
    total = num_shards * parts + sum(extra[:num_shards])
    config = settings(shards, streams=streams, shuffle_block=block, seed=seed)
    seen = defaultdict(Counter)
    orders = defaultdict(list)
    for number in range(streams):
        stream = text_stream(config, NumberTokenizer(), number)
        while stream.state.epoch < 2:
            (row,) = stream.take(1)
            seen[stream.state.epoch][int(row[0])] += 1
            orders[stream.state.epoch].append(int(row[0]))
    for epoch in (0, 1):
        assert seen[epoch] == Counter(range(1, total + 1))
    if total > 40 and block >= 5:  # blocks of one document are not shuffled
        assert orders[0] != orders[1]


@pytest.mark.parametrize("batching", ["pad", "pack"])
@pytest.mark.parametrize("streams", [6, 16, 24, 100])
def test_global_batches_are_the_same_for_any_number_of_ranks(tmp_path, batching, streams):
    shards = write_numbered(tmp_path, [31, 47, 29, 60, 33], lambda number: number % 11 + 1)
    config = data_config(batching=batching, streams=streams)
    expected = global_batches(make_loaders(config, shards, 1), 15)
    assert len(np.unique(expected[..., 0])) > 100
    for world_size in (2, 3, 4, 6, 8, 12, 24):
        assert np.array_equal(global_batches(make_loaders(config, shards, world_size), 15), expected)


def test_streams_above_the_global_batch_are_not_used(tmp_path):
    shards = write_numbered(tmp_path, [50])
    config = data_config(streams=100)
    for world_size in range(1, 17):
        batches = global_batches(make_loaders(config, shards, world_size, global_batch=world_size), 2)
        assert batches.shape == (2, world_size, 9)
        assert len(np.unique(batches[..., 0])) == 2 * world_size  # nothing twice within the first epoch


@in_fixture
@given(
    updates=st.integers(0, 9),
    before=st.sampled_from([1, 2, 3, 4, 8]),
    after=st.sampled_from([1, 2, 4, 6, 12]),
    batching=st.sampled_from(list(BATCHINGS)),
    streams=st.integers(1, 12),
)
def test_resume_on_other_ranks_is_exact(tmp_path, updates, before, after, batching, streams):
    shards = write_numbered(tmp_path, [31, 27, 14, 20], lambda number: number % 37 + 1)
    config = data_config(**BATCHINGS[batching], streams=streams)
    whole = make_loaders(config, shards, 1)
    expected = global_batches(whole, updates + 6)
    first = make_loaders(config, shards, before)
    for _ in range(updates):
        for loader in first:
            next(loader)
    middle = saved(first)
    second = make_loaders(config, shards, after, state=middle)
    assert saved(second) == middle
    assert np.array_equal(global_batches(second, 6), expected[updates:])
    assert saved(second) == saved(whole)


@pytest.mark.parametrize("batching", ["pack", "marked"])
def test_resume_in_the_middle_of_a_document(tmp_path, batching):
    """Documents of 100 tokens, rows of 8: nearly all cursors stand inside one."""
    shards = write_numbered(tmp_path, [40, 40], lambda number: 100)
    config = data_config(**BATCHINGS[batching], streams=4)
    loaders = make_loaders(config, shards, 4)
    global_batches(loaders, 5)
    state = saved(loaders)
    assert any(stream["token"] > 0 for stream in state["streams"].values())
    expected = global_batches(loaders, 40)
    assert np.array_equal(global_batches(make_loaders(config, shards, 2, state=state), 40), expected)


def test_data_may_move(tmp_path):
    for place in ("here", "there/below"):
        (tmp_path / place).mkdir(parents=True)
    config = data_config()
    here = make_loaders(config, write_numbered(tmp_path / "here", [40, 50]), 1)
    global_batches(here, 3)
    there = make_loaders(config, write_numbered(tmp_path / "there/below", [40, 50]), 2, state=saved(here))
    assert np.array_equal(global_batches(there, 3), global_batches(here, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 16}, r"data\.seq_len \(8, now 16\)"),
        ({"batching": "pack"}, r"data\.batching \('pad', now 'pack'\)"),
        ({"batching": "pack", "reset_attention": True}, r"'pack'\), data\.reset_attention \(None, now True\)"),
        ({"truncate": "eos"}, r"data\.truncate \('text', now 'eos'\)"),
        ({"streams": 5}, r"data\.streams \(6, now 5\)"),
        ({"shuffle_block": 9, "text_field": "body"}, r"data\.text_field .*, data\.shuffle_block \(4, now 9\)"),
    ],
)
def test_a_cursor_of_another_order_is_refused(tmp_path, change, message):
    shards = write_numbered(tmp_path, [40, 50])
    state = saved(make_loaders(data_config(), shards, 1))
    with pytest.raises(CheckpointError, match=message):
        make_loaders(data_config(**change), shards, 1, state=state)


def test_a_cursor_of_another_way_to_cut_is_refused_for_padded_rows_only(tmp_path):
    """A cursor from before there was `data.truncate` is one of text."""
    shards = write_numbered(tmp_path, [40, 50])
    eos = saved(make_loaders(data_config(truncate="eos"), shards, 1))
    assert "data.truncate" not in saved(make_loaders(data_config(), shards, 1))["order"]
    with pytest.raises(CheckpointError, match=r"data\.truncate \('eos', now 'text'\)"):
        make_loaders(data_config(), shards, 1, state=eos)
    packed = saved(make_loaders(data_config(batching="pack", truncate="eos"), shards, 1))
    make_loaders(data_config(batching="pack"), shards, 1, state=packed)


def test_a_cursor_of_other_data_is_refused(tmp_path, monkeypatch):
    shards = write_numbered(tmp_path, [40, 50])
    state = saved(make_loaders(data_config(), shards, 1))
    with pytest.raises(CheckpointError, match=r"data\.source \(2 files, \w{16}, now 1 files"):
        make_loaders(data_config(), shards[:1], 1, state=state)
    (tmp_path / "rebuilt").mkdir()
    rebuilt = write_numbered(tmp_path / "rebuilt", [40, 51])
    assert [Path(shard).name for shard in rebuilt] == [Path(shard).name for shard in shards]
    with pytest.raises(CheckpointError, match=r"bytes of data\.source \(\d+, now \d+\)"):
        make_loaders(data_config(), rebuilt, 1, state=state)
    with pytest.raises(CheckpointError, match=r"seed \(3, now 4\)"):
        make_loaders(data_config(), shards, 1, state=state, seed=4)
    monkeypatch.setattr(NumberTokenizer, "fingerprint", "f" * 16)
    with pytest.raises(CheckpointError, match=r"data\.tokenizer \(0123456789abcdef, now f{16}\)"):
        make_loaders(data_config(), shards, 1, state=state)


def test_a_resume_names_the_file_whose_content_has_changed(tmp_path):
    """Not that it has another date or another place, as in a copy."""
    shards = write_numbered(tmp_path, [40, 50])
    state = saved(make_loaders(data_config(), shards, 1))
    Path(shards[0]).rename(tmp_path / "x")
    write_numbered(tmp_path, [40, 50])
    os.utime(shards[1], (1, 1))
    (tmp_path / "copy").mkdir()
    for directory in (tmp_path, tmp_path / "copy"):
        make_loaders(data_config(), write_numbered(directory, [40, 50]), 1, state=state)
    content = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(content[:-9] + b'5"}\n\n\n\n\n\n\n'[:9])
    assert Path(shards[1]).stat().st_size == len(content)
    with pytest.raises(CheckpointError, match=r"contents of data\.source \(changed: [^,]*shard-001\.jsonl\)"):
        make_loaders(data_config(), shards, 1, state=state)
    # Cursors from before contents were looked at.
    del state["order"]["contents of data.source"]
    for stream in state["streams"].values():
        del stream["too_long"]
    make_loaders(data_config(), shards, 1, state=state)


@pytest.mark.parametrize("change", ["replaced", "overwritten", "truncated", "removed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_in_mid_run_stops_it(tmp_path, change, workers, shared_data, monkeypatch):
    monkeypatch.undo()
    tokenizer = shared_data / "tokenizers" / "t5-32k.model"
    shards = write_numbered(tmp_path, [40, 50])
    (loader,) = make_loaders(data_config(workers=workers, prefetch=1), shards, 1, tokenizer_path=tokenizer)
    next(loader)
    path = Path(shards[1])
    content = path.read_bytes().replace(b"9", b"8")
    if change == "replaced":
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").rename(path)
    elif change == "removed":
        path.unlink()
    else:
        path.write_bytes(content if change == "overwritten" else content[:100])
    with pytest.raises(DataError, match=r"shard-001\.jsonl (has changed since the run began|does not exist)"):
        for _ in range(60):
            next(loader)
    loader.close()


def test_documents_that_are_too_long_are_counted(tmp_path):
    texts = [str(number) for number in range(1, 60)]
    shard = write_shard(tmp_path / "x.jsonl", [*texts, "7 " * 100, *texts])
    config = data_config(max_document_bytes=100, max_bad_fraction=0.1)
    loaders = make_loaders(config, [shard], 1)
    rows = global_batches(loaders, 30)
    assert loaders[0].stats.bad["too_long"] > 0
    assert not ((rows == 7).sum(axis=-1) > 1).any()
    with pytest.raises(CheckpointError, match=r"data\.max_document_bytes \(100, now None\)"):
        make_loaders(data_config(max_bad_fraction=0.1), [shard], 1, state=saved(loaders))
    with pytest.raises(DataError, match=r"too_long: 1\).*raise data\.max_document_bytes"):
        global_batches(make_loaders(data_config(max_document_bytes=100, max_bad_fraction=0), [shard], 1), 30)


def test_merging_checks_the_ranks(tmp_path):
    shards = write_numbered(tmp_path, [40, 50])
    loaders = make_loaders(data_config(), shards, 4)
    states = [loader.state_dict() for loader in loaders]
    with pytest.raises(CheckpointError, match="no rank"):
        merge_states([])
    with pytest.raises(CheckpointError, match=r"no rank has saved the position of the data streams \[5\]"):
        merge_states(states[:3])
    next(loaders[1])
    with pytest.raises(CheckpointError, match="ranks 0 and 1 disagree on the data's updates"):
        merge_states([states[0], loaders[1].state_dict(), *states[2:]])
    lagging = {**loaders[1].state_dict(), "updates": 0}
    with pytest.raises(CheckpointError, match="rank 1 disagrees with a lower rank on the position of data stream 1"):
        merge_states([states[0], lagging, *states[2:]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.update(version=2), "version 2"),
        (lambda state: state.pop("streams"), "damaged: no streams"),
        (lambda state: state["streams"].pop("3"), r"lacks the streams \[3\]"),
        (lambda state: state["streams"]["3"].pop("block"), "damaged"),
        (lambda state: state["streams"]["3"].update(token=-1), "damaged"),
        (lambda state: state["streams"]["3"].update(token=1.5), "damaged"),
    ],
)
def test_damaged_cursors(tmp_path, damage, message):
    shards = write_numbered(tmp_path, [40])
    state = saved(make_loaders(data_config(), shards, 1))
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        make_loaders(data_config(), shards, 1, state=state)


def test_no_shards():
    with pytest.raises(DataError, match="no shards"):
        make_loaders(data_config(), [], 1)


def test_faults_are_skipped_and_counted(tmp_path):
    good = [str(number) for number in range(1, 300)]
    raw = [b"garbage", b'{"title": "x"}', b'{"text": "\xff"}', b'{"text": "  "}', b""]
    shard = write_shard(tmp_path / "x.json.gz", good, raw=raw)
    (loader,) = make_loaders(data_config(max_bad_fraction=0.05), [shard], 1, global_batch=8)
    rows = np.concatenate([next(loader) for _ in range(50)])
    # Streams that are through go on with their next epoch: 400 rows hold each of the 299 at least once.
    assert set(rows[:, 0].tolist()) == set(range(1, 300))
    assert loader.stats.documents == 400 + sum(loader.stats.bad.values())
    assert all(loader.stats.bad[cause] >= 1 for cause in ("not_json", "no_text", "invalid_utf8"))
    assert loader.stats.bad["empty"] >= 2
    assert loader.stats.wait_s > 0


def test_one_bad_line_in_a_small_file_is_not_too_much(tmp_path):
    """1 of 200 is accepted at 1%, though it is 1 of 34 for the stream that meets it, in every epoch."""
    shard = write_shard(tmp_path / "x.jsonl", [str(number) for number in range(1, 200)], raw=[b"garbage"])
    (loader,) = make_loaders(data_config(), [shard], 1)
    for _ in range(400):
        next(loader)
    assert loader.stats.bad["not_json"] > 20


@pytest.mark.parametrize("raw", [b"garbage", b'{"title": "x"}', b'{"text": ""}'])
def test_too_many_bad_lines_in_a_small_file(tmp_path, raw):
    shard = write_shard(tmp_path / "x.jsonl", [str(number) for number in range(1, 190)], raw=[raw] * 10)
    (loader,) = make_loaders(data_config(), [shard], 1)
    with pytest.raises(
        DataError, match=r"x\.jsonl.*10 of 199 documents cannot be used.*line 190 of .*x\.jsonl"
    ) as error:
        for _ in range(400):
            next(loader)
    assert "max_bad_fraction" in messages(error)
    with pytest.raises(DataError, match="10 of 199"):  # and stays failed
        next(loader)


def test_too_many_bad_lines_in_a_large_file(tmp_path):
    """Found after 1000 documents, long before the end of the file."""
    shard = tmp_path / "x.jsonl"
    shard.write_bytes(b'{"text": "1"}\nbad\n' * 20_000)
    (loader,) = make_loaders(data_config(streams=1), [str(shard)], 1)
    with pytest.raises(DataError, match=r"of 100\d documents cannot be used \(not_json: 5"):
        for _ in range(100):
            next(loader)


def test_bad_lines_before_the_resume_still_count(tmp_path):
    """A run that is stopped again and again must not forget what it has skipped."""
    shard = tmp_path / "x.jsonl"
    shard.write_bytes(b'{"text": "1"}\nbad\n' * 20_000)
    config = data_config(streams=1)
    loaders = make_loaders(config, [str(shard)], 1)
    with pytest.raises(DataError, match="cannot be used"):
        for _ in range(100):
            next(loaders[0])
            loaders = make_loaders(config, [str(shard)], 1, state=saved(loaders))


def test_a_stream_without_documents(tmp_path):
    shards = write_numbered(tmp_path, [3])
    (loader,) = make_loaders(data_config(streams=4), shards, 1)
    with pytest.raises(DataError, match=r"stream 3 of 4 has no document in .*shard-000\.jsonl.*Set data\.streams"):
        next(loader)
    all_bad = write_shard(tmp_path / "bad.jsonl", [], raw=[b"garbage"] * 30)
    (loader,) = make_loaders(data_config(streams=4, max_bad_fraction=1.0), [all_bad], 1)
    with pytest.raises(DataError, match="no usable document"):
        next(loader)


def test_a_damaged_shard_is_never_skipped(tmp_path):
    good = write_shard(tmp_path / "good.json.gz", [str(number) for number in range(1, 400)])
    cut = tmp_path / "cut.json.gz"
    content = (tmp_path / "good.json.gz").read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    (loader,) = make_loaders(data_config(), [good, str(cut)], 1)
    with pytest.raises(DataError, match=r"cut\.json\.gz after \d+ lines"):
        for _ in range(400):
            next(loader)


def test_a_shard_that_vanishes(tmp_path):
    shards = write_numbered(tmp_path, [100, 100])
    (loader,) = make_loaders(data_config(streams=1), shards, 1)
    next(loader)
    for shard in tmp_path.iterdir():
        shard.unlink()
    with pytest.raises(DataError, match=r"shard-00\d\.jsonl does not exist"):
        for _ in range(100):
            next(loader)


def test_packed_streams_lose_nothing(tmp_path):
    """The tokens of one epoch of one stream are the documents, whole and in the order of pad."""
    shards = write_numbered(tmp_path, [30, 30], lambda number: number % 13 + 1)
    order = []
    stream = text_stream(settings(shards, streams=1), NumberTokenizer())
    while (row := stream.take(1)[0]) is not None and stream.state.epoch == 0:
        order.append(int(row[0]))
    text = [token for number in order for token in [number] * (number % 13 + 1) + [0]]
    stream = text_stream(settings(shards, streams=1, batching="pack"), NumberTokenizer())
    rows = stream.take(len(text) // 8)
    assert PADDING not in rows
    assert [*rows[0, :1], *rows[:, 1:].ravel()] == text[: rows.shape[0] * 8 + 1]


def test_only_the_rows_of_an_update_are_taken(tmp_path):
    """States count rows, so that ranks that share a stream can be compared."""
    shards = write_numbered(tmp_path, [100])
    from sltrain_dist.data.order import rank_shares

    shares = rank_shares(1, 4, 24, 6)
    group = StreamGroup(
        settings(shards, streams=6), NumberTokenizer(), shares, {share.stream: StreamState() for share in shares}
    )
    update = group.next_update()
    assert update.rows.shape == (6, 9)
    assert {stream: state.rows for stream, state in update.states.items()} == {1: 4, 2: 4}
