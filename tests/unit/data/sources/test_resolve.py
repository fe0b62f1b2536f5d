"""Resolving sources and reading shards: what is there is read exactly, what is not is named."""

import bz2
import gzip
import io
import lzma
import random
import re
import sys
from types import SimpleNamespace
from typing import ClassVar

import datasets
import fsspec
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import given
from hypothesis import strategies as st

from sltrain_dist.data.sources import resolve
from sltrain_dist.data.sources.resolve import read_documents, resolve_source
from sltrain_dist.data.sources.retry import Cause, Fetcher, RetryPolicy
from sltrain_dist.errors import DataError
from tests.support.data import write_shard


def contents(shard, *arguments):
    return [line for _, line in read_documents(shard, "text", *arguments)]


def test_file_directory_and_glob(tmp_path, monkeypatch):
    names = ["b.json.gz", "a.jsonl", "c.json", "d.ndjson.xz"]
    for name in [*names, "README.md", "tokenizer.model"]:
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.json").touch()
    path = {name: str(tmp_path / name) for name in [*names, "sub/e.json"]}
    assert resolve_source(path["c.json"]) == [path["c.json"]]
    assert resolve_source(str(tmp_path)) == [path[name] for name in sorted(names)]
    assert resolve_source(f"{tmp_path}/*.json*") == [path["a.jsonl"], path["b.json.gz"], path["c.json"]]
    assert resolve_source(f"{tmp_path}/**/*.json") == [path["c.json"], path["sub/e.json"]]
    assert resolve_source([path["c.json"], f"file://{path['a.jsonl']}", str(tmp_path / "c*")]) == [
        path["a.jsonl"],
        path["c.json"],
    ]
    monkeypatch.chdir(tmp_path)
    assert resolve_source("sub/e.json") == [path["sub/e.json"]]  # not a Hub dataset: it exists
    assert resolve_source("sub") == [path["sub/e.json"]]


def test_directory_named_like_a_hub_dataset_is_local(tmp_path, monkeypatch):
    (tmp_path / "allenai" / "c4").mkdir(parents=True)
    (tmp_path / "allenai" / "c4" / "x.json.gz").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_source("allenai/c4", subset="en") == [str(tmp_path / "allenai/c4/x.json.gz")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere/*.json.gz", r"no file matches the glob 'nowhere/\*\.json\.gz'"),
        ("nowhere/train.json.gz", "no file or directory 'nowhere/train.json.gz'"),
        ("/nowhere/at/all", "no file or directory '/nowhere/at/all'"),
        ("c4", "neither a URL nor a Hub dataset"),
        ("", "no file or directory ''"),
        ([], "empty list"),
        ("memory://nowhere/*.json", "no file matches the glob 'memory://nowhere"),
        ("nosuchprotocol://bucket/*.json", "cannot list nosuchprotocol://bucket"),
    ],
)
def test_missing_sources_are_named(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(DataError, match=message):
        resolve_source(entry)


def test_unsuitable_files_are_refused(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"a\.csv is not Parquet, Arrow or JSON lines"):
        resolve_source(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="holds no"):
        resolve_source(str(tmp_path))


def test_hub_dataset(monkeypatch):
    files = [f"hf://datasets/allenai/c4@abc/en/c4-train.{i:05}-of-01024.json.gz" for i in (1, 0)]
    asked = []

    def load(name, subset):
        asked.append((name, subset))
        return SimpleNamespace(config=SimpleNamespace(data_files={datasets.Split.TRAIN: files}))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    assert resolve_source("allenai/c4", subset="en") == sorted(files)
    assert asked == [("allenai/c4", "en")]
    with pytest.raises(DataError, match=r"no files for split 'test'; it has \['train'\]"):
        resolve_source("allenai/c4", subset="en", split="test")
    files[:] = ["hf://datasets/x/y@abc/data/train-00000.parquet"]
    assert resolve_source("x/y") == files
    files[:] = ["hf://datasets/x/y@abc/data/train-00000.csv"]
    with pytest.raises(DataError, match=r"not stored as JSON lines.*train-00000\.csv"):
        resolve_source("x/y")


def test_resolution_understands_what_datasets_returns(tmp_path, monkeypatch):
    """`datasets` itself resolves a dataset laid out as allenai/c4 is, with the subset declared in its card."""
    (tmp_path / "en").mkdir()
    for split in ("train", "validation"):
        write_shard(tmp_path / "en" / f"c4-{split}.00000-of-00001.json.gz", ["text"])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n"
        "- config_name: xx\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n---\n"
    )
    load = datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda _, subset: load(str(tmp_path), subset, cache_dir=str(tmp_path / "c"))
    )
    expected = str(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz")
    assert resolve_source("allenai/c4", subset="en", split="validation") == [expected]
    with pytest.raises(DataError, match=r"(?s)allenai/c4.*Config name is missing.*data\.subset"):
        resolve_source("allenai/c4")


def test_unreachable_hub_explains_both_readings(monkeypatch):
    def load(name, subset):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    waits = []
    fetcher = Fetcher(RetryPolicy(retries=2), sleep=waits.append, jitter=lambda: 0.5)
    with pytest.raises(DataError, match=r"'data/train' is not a local.*3 attempts.*Couldn't reach.*HF_HUB_OFFLINE"):
        resolve_source("data/train", fetcher=fetcher)
    assert waits == [1, 2]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'data/train' is not a local.*failed too: ConnectionError: Couldn't reach"):
        resolve_source("data/train", fetcher=fetcher)
    assert waits == [1, 2], "nobody answers who must not be asked"


@pytest.mark.parametrize(("code", "attempts"), [(500, 3), (429, 3), (404, 1), (401, 1)])
def test_failures_that_datasets_calls_a_missing_file(monkeypatch, code, attempts):
    """It drops the status, which is to be found behind its error only."""
    asked, waits = [], []

    class StatusError(OSError):
        response = SimpleNamespace(status_code=code, headers={})

    def load(name, subset):
        asked.append(name)
        try:
            raise StatusError(f"status {code}")
        except StatusError:
            raise FileNotFoundError("Couldn't find any data file") from None

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(DataError, match=rf"'x/y' is not a local file.*StatusError: status {code}"):
        resolve_source("x/y", fetcher=Fetcher(RetryPolicy(retries=2), sleep=waits.append))
    assert (len(asked), len(waits)) == (attempts, attempts - 1)


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/c4/*.json.gz", "s3fs"), ("gs://bucket/c4", "gcsfs")])
def test_a_missing_plug_in_is_named(url, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    with pytest.raises(DataError, match=rf"cannot list {re.escape(url)}: ImportError: .*; pip install {package}"):
        resolve_source(url)
    with pytest.raises(DataError, match=rf"cannot read the shard {url[:5]}b/x\.json: .*; pip install {package}"):
        list(read_documents(f"{url[:5]}b/x.json", "text"))


def test_a_local_file_that_may_not_be_read(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "x.json", ["a"])

    def refuse(*_):
        raise PermissionError(13, "Permission denied", shard)

    monkeypatch.setattr(resolve.Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read the shard .*x\.json at its start: PermissionError") as error:
        list(read_documents(shard, "text"))
    assert "credentials" not in str(error.value)


class RefusingFileSystem(AbstractFileSystem):
    """Fails as `errors` says, then holds one file."""

    protocol = "refusing"
    errors: ClassVar[list[Exception]] = []

    def ls(self, path, detail=True, **kwargs):
        if self.errors:
            raise self.errors.pop(0)
        return [{"name": "bucket/a.json", "size": 3, "type": "file"}] if detail else ["bucket/a.json"]

    def info(self, path, **kwargs):
        return {"name": path, "type": "directory"}


@pytest.mark.parametrize(
    "pattern",
    ["g/*", "g/*.json", "g/**/*.json", "g/a/*.json", "g/*/*.json", "g/?/x[12].json", "g/a/b/**", "g/**", "none/*"],
)
def test_globs_find_what_fsspecs_own_finds(pattern):
    memory = fsspec.filesystem("memory")
    for name in ("x1.json", "a/x1.json", "a/x3.json", "a/b/x2.json", "a/b/c/x2.txt", "b/x2.json", "b/d/e/f/x.json"):
        memory.pipe(f"/g/{name}", b"{}")
    expected = [name for name in memory.glob(f"/{pattern}") if memory.isfile(name)]
    assert sorted(resolve._glob(memory, f"/{pattern}")) == sorted(expected)
    assert bool(expected) == (pattern != "none/*")


def test_a_listing_is_tried_again(monkeypatch):
    fsspec.register_implementation("refusing", RefusingFileSystem, clobber=True)
    waits = []
    fetcher = Fetcher(RetryPolicy(retries=2), sleep=waits.append, jitter=lambda: 0.5)
    for entry in ("refusing://bucket/*.json", "refusing://bucket"):
        monkeypatch.setattr(RefusingFileSystem, "errors", [TimeoutError(), ConnectionResetError()])
        assert resolve_source(entry, fetcher=fetcher) == ["refusing://bucket/a.json"]
        monkeypatch.setattr(RefusingFileSystem, "errors", [TimeoutError()] * 3)
        with pytest.raises(DataError, match=rf"{re.escape(entry)}: gave up after 3 attempts.*timeout"):
            resolve_source(entry, fetcher=fetcher)
        monkeypatch.setattr(RefusingFileSystem, "errors", [PermissionError("Access Denied")])
        with pytest.raises(DataError, match=r"Access Denied; check the credentials for refusing://"):
            resolve_source(entry, fetcher=fetcher)
    assert waits == [1, 2] * 4


def test_remote_urls():
    memory = fsspec.filesystem("memory")
    for name in ("b.json", "a.jsonl.gz", "notes.txt"):
        memory.pipe(f"/corpus/{name}", b"{}\n")
    expected = ["memory:///corpus/a.jsonl.gz", "memory:///corpus/b.json"]
    assert [url.replace("memory:///", "memory://") for url in resolve_source("memory://corpus")] == [
        url.replace("memory:///", "memory://") for url in expected
    ]
    assert len(resolve_source("memory://corpus/*.json*")) == 2
    url = "https://example.org/data.json.gz?download=true"
    assert resolve_source(url) == [url]  # not asked: one request a shard would be many


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_lines_are_lossless(tmp_path, suffix, compress):
    lines = [
        b"plain",
        b"",
        b"next line \xc2\x85 and \xe2\x80\xa8 in UTF-8",
        b"windows\r",
        b"a\rb",
        b"\xff\xfe\x00",
        b"end",
    ]
    shard = tmp_path / f"x.jsonl{suffix}"
    shard.write_bytes(compress(b"\n".join(lines)))
    assert list(read_documents(str(shard), "text")) == [
        (i, line + b"\n" if i < len(lines) - 1 else line) for i, line in enumerate(lines)
    ]
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/lossless/x.jsonl{suffix}", shard.read_bytes())
    assert list(read_documents(f"memory://lossless/x.jsonl{suffix}", "text")) == list(
        read_documents(str(shard), "text")
    )


@given(count=st.integers(0, 30), first=st.integers(0, 35), step=st.integers(1, 9))
def test_parts_of_a_shard(tmp_path_factory, count, first, step):
    shard = tmp_path_factory.getbasetemp() / "parts.jsonl"
    shard.write_text("".join(f"{i}\n" for i in range(count)))
    assert list(read_documents(str(shard), "text", first, step)) == [
        (i, b"%d\n" % i) for i in range(first, count, step)
    ]


@pytest.fixture
def archive(tmp_path):
    rng = random.Random(0)
    return tmp_path, gzip.compress(b"".join(b"%d %s\n" % (i, rng.randbytes(40).hex().encode()) for i in range(5000)))


def test_truncated_gzip(archive):
    directory, content = archive
    (directory / "t.json.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"t\.json\.gz after 2\d\d\d lines: EOFError.*truncated"):
        contents(str(directory / "t.json.gz"))


def test_corrupt_gzip(archive):
    directory, content = archive
    middle = len(content) // 2
    (directory / "c.json.gz").write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    with pytest.raises(DataError, match=r"c\.json\.gz after \d+ lines: .*must be replaced"):
        contents(str(directory / "c.json.gz"))


def test_wrong_checksum_and_not_gzip_at_all(archive):
    directory, content = archive
    (directory / "crc.json.gz").write_bytes(content[:-8] + bytes(8))
    (directory / "text.json.gz").write_bytes(b'{"text": "not compressed"}\n')
    (directory / "nothing.json.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"crc\.json\.gz after \d+ lines: BadGzipFile.*data check"):
        contents(str(directory / "crc.json.gz"))
    with pytest.raises(DataError, match=r"text\.json\.gz at its start: BadGzipFile"):
        contents(str(directory / "text.json.gz"))
    with pytest.raises(DataError, match=r"nothing\.json\.gz at its start: EOFError.*truncated"):
        contents(str(directory / "nothing.json.gz"))
    (directory / "empty.json").write_bytes(b"")
    assert contents(str(directory / "empty.json")) == []


def test_vanished_shard(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        contents(str(tmp_path / "gone.json"))


class FlakyFileSystem(AbstractFileSystem):
    """One file at every path, whose reads beyond the first 100 kB fail, `failures` times."""

    protocol = "flaky"
    content = b""
    failures = 0

    def _open(self, path, *args, **kwargs):
        return FlakyFile(self.content)


class FlakyFile(io.BytesIO):
    def read(self, size=-1):
        if self.tell() > 100_000 and FlakyFileSystem.failures:
            FlakyFileSystem.failures -= 1
            raise ConnectionResetError("connection reset by peer")
        return super().read(size)


def test_remote_reads_are_tried_again(archive, monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    waits = []
    fetcher = Fetcher(sleep=waits.append, jitter=lambda: 0.5)
    monkeypatch.setattr(FlakyFileSystem, "content", archive[1])
    monkeypatch.setattr(FlakyFileSystem, "failures", 0)
    expected = list(read_documents("flaky://x.json.gz", "text", fetcher=fetcher))
    FlakyFileSystem.failures = 3
    assert list(read_documents("flaky://x.json.gz", "text", fetcher=fetcher)) == expected
    assert len(expected) == 5000
    assert waits == [1, 2, 4]
    assert fetcher.retries == {Cause.CONNECTION: 3}
    FlakyFileSystem.failures = 1000
    with pytest.raises(DataError, match=r"flaky://x.json.gz: gave up after 9 attempts.*connection reset"):
        list(read_documents("flaky://x.json.gz", "text", fetcher=fetcher))
    assert waits[3:] == [1, 2, 4, 8, 16, 32, 60, 60]
