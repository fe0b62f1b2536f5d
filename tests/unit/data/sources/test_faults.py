"""Bad networks and bad files: the rows are those of a good one, or the run stops and names the shard."""

import gzip
import os
import random
import urllib.error
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sltrain_dist.data import loader as loader_module
from sltrain_dist.data.sources.resolve import read_documents, resolve_source
from sltrain_dist.data.sources.retry import Cause, Fetcher, RetryPolicy
from sltrain_dist.errors import DataError
from tests.support.data import NumberTokenizer, data_config, make_loaders, write_shard
from tests.support.fault_server import cut, flip, serve, stall, status

DOCUMENTS = 500
UPDATES = 48
"""Of 24 rows: more than an epoch."""


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Two shards, each of several times the bytes that are read at once."""
    directory = tmp_path_factory.mktemp("faults")
    rng = random.Random(0)
    shards = {}
    for name in ("a.json.gz", "b.json.gz"):
        # Few tokens, and a long word that is none: the bytes are what matters here.
        texts = [
            f"{rng.randrange(2**31)} {rng.randrange(2**31)} x{rng.randbytes(1300).hex()}" for _ in range(DOCUMENTS)
        ]
        write_shard(directory / name, texts)
        shards[name] = (directory / name).read_bytes()
    assert all(len(content) > 500_000 for content in shards.values())
    return shards


@pytest.fixture
def server(contents, monkeypatch):
    monkeypatch.setattr(loader_module, "Tokenizer", NumberTokenizer)
    with serve() as running:
        running.files.update(contents)
        yield running


def make_loader(server, state=None):
    shards = [server.address(name) for name in ("a.json.gz", "b.json.gz")]
    config = data_config(streams=2, retries=4, retry_wait_s=0.001, timeout_s=0.4)
    return make_loaders(config, shards, 1, state=state)[0]


@pytest.fixture(scope="module")
def expected(contents):
    """What comes without faults."""
    with pytest.MonkeyPatch.context() as patch, serve() as running:
        patch.setattr(loader_module, "Tokenizer", NumberTokenizer)
        running.files.update(contents)
        loader = make_loader(running)
        rows = np.stack([next(loader) for _ in range(UPDATES)])
        assert not any(loader.stats.retries.values())
        assert len(np.unique(rows[..., 0])) > 0.99 * 2 * DOCUMENTS
        return rows


MENDED = [
    ("time-out before the answer", [stall(0.0)], {"timeout": 1}),
    ("time-out in the middle", [stall(0.6), stall(0.5)], {"timeout": 2}),
    ("408", [status(408)], {"timeout": 1}),
    ("429 with Retry-After", [status(429, Retry_After="1")], {"rate_limit": 1}),
    ("500", [status(500)] * 3, {"server_error": 3}),
    ("503, later in the middle too", [status(503), cut(0.5), status(503)], {"server_error": 2, "truncated": 1}),
    ("connection closed in the middle", [cut(0.7), cut(0.0), cut(0.5)], {"truncated": 3}),
    ("connection reset before the answer", [cut(0.0, reset=True)], {}),
    ("truncated by a byte", [cut(1 - 1e-6)], {"truncated": 1}),
]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
@pytest.mark.parametrize(("faults", "retries"), [case[1:] for case in MENDED], ids=[case[0] for case in MENDED])
def test_what_passes_changes_nothing(server, expected, faults, retries, ranges):
    server.ranges = ranges
    server.plan["b.json.gz"] = list(faults)
    loader = make_loader(server)
    assert np.array_equal(np.stack([next(loader) for _ in range(UPDATES)]), expected)
    assert not server.plan["b.json.gz"]
    found = {cause: count for cause, count in loader.stats.retries.items() if count}
    assert sum(found.values()) == len(faults)
    assert found.items() >= retries.items()


LASTING = [
    ("a shard that was never there", [status(404)], "does not exist"),
    ("a shard that vanishes in the middle", [cut(0.6), status(404)], "does not exist"),
    ("no permission", [status(403)], "HTTPError"),
    ("an outage", [cut(0.6), *[status(503)] * 5], "gave up after 5 attempts.*server_error"),
    ("silence for good", [stall(0.0)] * 5, "gave up after 5 attempts.*timeout"),
    ("a server that asks for two hours", [status(429, Retry_After="7200")], "asked for 7200 s"),
    ("a flipped byte", [flip(0.5)], "must be replaced"),
    ("a flipped byte of the checksum", [flip(1 - 5e-6)], "must be replaced"),
]


@pytest.mark.parametrize(("faults", "message"), [case[1:] for case in LASTING], ids=[case[0] for case in LASTING])
def test_what_does_not_pass_stops_the_run_and_names_the_shard(server, expected, faults, message):
    server.plan["b.json.gz"] = list(faults)
    loader = make_loader(server)
    with pytest.raises(DataError, match=f"(?s)b.json.gz.*{message}") as error:
        for row in expected:
            assert np.array_equal(next(loader), row) or "flipped" in message or "must be replaced" in message
    assert error.value.exit_code == 3


@pytest.mark.parametrize("change", ["truncated", "grown", "vanished"])
def test_a_shard_that_changes_on_the_server(server, expected, change):
    """The first answer is cut; the file is another one when the reader comes back."""
    good = server.files["b.json.gz"]
    changed = {"truncated": good[:-1000], "grown": good + good, "vanished": None}[change]

    def replace(handler, body, send):
        if changed is None:
            del server.files["b.json.gz"]
        else:
            server.files["b.json.gz"] = changed
        cut(0.6)(handler, body, send)

    server.plan["b.json.gz"] = [replace]
    loader = make_loader(server)
    with pytest.raises(DataError, match=r"b\.json\.gz (has changed|does not exist)"):
        for row in expected:
            assert np.array_equal(next(loader), row)


def test_other_bytes_of_the_same_size_without_ranges(server, expected):
    """What is read again must be what was read before."""
    server.ranges = False
    server.plan["b.json.gz"] = [cut(0.6), flip(0.3)]
    loader = make_loader(server)
    with pytest.raises(DataError, match=r"b\.json\.gz has changed while it was read: its first \d+ bytes"):
        for row in expected:
            assert np.array_equal(next(loader), row)


def test_a_shard_that_is_truncated_on_the_server(server, expected):
    server.files["b.json.gz"] = server.files["b.json.gz"][:-20_000]
    loader = make_loader(server)
    with pytest.raises(DataError, match=r"b\.json\.gz after \d+ lines: EOFError"):
        for row in expected:
            assert np.array_equal(next(loader), row)


@pytest.mark.parametrize("ranges", [True, False])
def test_zstd_over_a_network_that_fails(server, ranges):
    """Cut in each of several frames, it goes on at the byte where it stopped."""
    lines = [b'{"text": "%s"}\n' % os.urandom(400).hex().encode() for _ in range(900)]
    frames = [zstd.compress(b"".join(lines[start : start + 300])) for start in (0, 300, 600)]
    server.files["x.jsonl.zst"] = b"".join(frames)
    server.ranges = ranges
    # Without ranges, each answer begins anew and so must reach further than the one before.
    shares = (0.3, 0.5, 0.5) if ranges else (0.3, 0.6, 0.9)
    server.plan["x.jsonl.zst"] = [cut(shares[0]), cut(shares[1]), status(503), cut(shares[2])]
    fetcher = Fetcher(RetryPolicy(wait_s=0))
    found = [line for _, line in read_documents(server.address("x.jsonl.zst"), "text", fetcher=fetcher)]
    assert found == lines
    assert sum(fetcher.retries.values()) == 4
    server.files["x.jsonl.zst"] = b"".join(frames)[:-9]
    with pytest.raises(DataError, match=r"x\.jsonl\.zst after \d+ lines: EOFError"):
        list(read_documents(server.address("x.jsonl.zst"), "text"))


def test_going_on_reads_only_what_is_missing(server, expected):
    server.plan["b.json.gz"] = [cut(0.7)]
    list(read_documents(server.address("b.json.gz"), "text", fetcher=Fetcher(RetryPolicy(wait_s=0))))
    (first, second) = server.requests
    assert first[1] is None
    assert second[1] == f"bytes={int(len(server.files['b.json.gz']) * 0.7)}-"


def test_resume_from_a_bad_network(server, expected):
    loader = make_loader(server)
    for row in expected[:20]:
        assert np.array_equal(next(loader), row)
    server.plan["b.json.gz"] = [status(500), cut(0.5)]
    loader = make_loader(server, loader.state_dict())
    for row in expected[20:]:
        assert np.array_equal(next(loader), row)
    assert sum(loader.stats.retries.values()) == 2


def test_waits():
    """Doubling to a minute, random by a half, and never shorter than the server asks for."""
    waits = []

    for jitter, factor in ((0.0, 0.5), (0.75, 1.25)):
        waits.clear()
        fetcher = Fetcher(RetryPolicy(retries=7, wait_s=2.0), sleep=waits.append, jitter=lambda value=jitter: value)
        for failures in range(1, 8):
            fetcher.pause("u", failures, TimeoutError())
        assert waits == [factor * wait for wait in (2, 4, 8, 16, 32, 60, 60)]
        assert fetcher.retries == Counter({Cause.TIMEOUT: 7})
    for value, least, most in (
        ("17", 17, 17),
        (format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True), 80, 90),
        ("soon", 2.5, 2.5),
        (format_datetime(datetime.now(UTC) - timedelta(seconds=90), usegmt=True), 2.5, 2.5),
    ):
        error = urllib.error.HTTPError("u", 429, "", {"Retry-After": value}, None)
        fetcher.pause("u", 1, error)
        assert least <= waits[-1] <= most
    with pytest.raises(DataError, match=r"u: gave up after 8 attempts"):
        fetcher.pause("u", 8, TimeoutError())
    with pytest.raises(FileNotFoundError):
        fetcher.pause("u", 1, FileNotFoundError())


def test_an_answer_without_a_length_has_no_end(server):
    """Lines without compression could be cut unnoticed; a compressed file says itself where it ends."""

    def without_length(handler, body, send):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    server.files["c.jsonl"] = b'{"text": "1"}\n' * 1000
    server.plan["c.jsonl"] = [without_length]
    with pytest.raises(DataError, match=r"does not report the size of .*c\.jsonl"):
        list(read_documents(server.address("c.jsonl"), "text"))
    server.plan["a.json.gz"] = [without_length]
    assert len(list(read_documents(server.address("a.json.gz"), "text"))) == DOCUMENTS


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), truncate=st.booleans())
def test_no_damage_to_a_gzip_file_is_silent(tmp_path, where, bit, truncate):
    lines = [b'{"text": "%d and %d"}\n' % (i, i * i) for i in range(300)]
    content = bytearray(gzip.compress(b"".join(lines), mtime=0))
    position = int(where * len(content))
    if truncate:
        del content[position:]
    else:
        content[position] ^= 1 << bit
    shard = tmp_path / "x.json.gz"
    shard.write_bytes(content)
    try:
        found = [line for _, line in read_documents(str(shard), "text")]
    except DataError as error:
        assert "x.json.gz" in str(error)
    else:
        assert found == lines  # a bit of the header that says nothing about the content
        assert not truncate


def test_nobody_listens():
    with serve() as gone:
        pass
    waits = []
    fetcher = Fetcher(RetryPolicy(retries=2), sleep=waits.append)
    with pytest.raises(DataError, match=r"x\.json.*gave up after 3 attempts.*connection.*refused"):
        list(read_documents(gone.address("x.json"), "text", fetcher=fetcher))
    assert len(waits) == 2
    assert fetcher.retries == {Cause.CONNECTION: 2}


def test_glob_over_http(server):
    """Where the server lists its directory, and also when it does so only the second time."""
    server.files[""] = b'<a href="a.json.gz">a</a> <a href="b.json.gz">b</a> <a href="other.txt">c</a>'
    server.plan[""] = [status(503)]
    waits = []
    found = resolve_source(server.address("*.json.gz"), fetcher=Fetcher(sleep=waits.append))
    assert found == [server.address("a.json.gz"), server.address("b.json.gz")]
    assert len(waits) == 1


def test_listing_is_tried_again():
    waits = []
    fetcher = Fetcher(sleep=waits.append)
    answers = iter([TimeoutError("slow"), ConnectionResetError("gone"), ["x"]])

    def listing():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert fetcher.call("s3://bucket/*", listing) == ["x"]
    assert len(waits) == 2
    with pytest.raises(DataError, match=r"cannot list nosuch://bucket/\*"):
        resolve_source("nosuch://bucket/*", fetcher=fetcher)
    assert len(waits) == 2


def test_parquet_through_a_bad_network(server, tmp_path):
    texts = [f"{number} {random.Random(number).randbytes(2000).hex()}" for number in range(300)]
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=100, compression="none", use_dictionary=False)
    server.files["x.parquet"] = (tmp_path / "x.parquet").read_bytes()
    server.plan["x.parquet"] = [status(500), None, cut(0.3), cut(0.4), status(429)]
    fetcher = Fetcher(RetryPolicy(wait_s=0.0))
    found = [text for _, text in read_documents(server.address("x.parquet"), "text", fetcher=fetcher)]
    assert found == [text.encode() for text in texts]
    assert sum(fetcher.retries.values()) == 4
    server.ranges = False
    with pytest.raises(DataError, match=r"x\.parquet needs a server with range requests"):
        list(read_documents(server.address("x.parquet"), "text"))
