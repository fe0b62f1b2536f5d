from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from sltrain_dist.config.paths import default_cache_dir
from sltrain_dist.data.prepare import embedded, make_corpus, shards
from sltrain_dist.data.prepare.embedded import docstrings, find_installation, find_packages, raw_documents
from sltrain_dist.data.prepare.inputs import Document, InputOptions, find_inputs, read_documents
from sltrain_dist.data.prepare.make_corpus import (
    PrepareOptions,
    build_corpus_of_packages,
    build_embedded,
    prepare_files,
)
from sltrain_dist.data.prepare.shards import MANIFEST, CorpusManifest, is_complete, write_corpus
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.errors import ConfigError, DataError, StorageError
from sltrain_dist.files import writing_directory

TEXT = "the river of time is a long and quiet one that nobody can see but all of us follow to sea for ever"
WORDS = TEXT.split()


def _prose(seed: str, sentences: int = 4) -> str:
    rng = random.Random(seed)
    return " ".join(" ".join(["The", *rng.choices(WORDS, k=9)]) + "." for _ in range(sentences))


def _package(root: Path, name: str, version: str = "1.0", functions: int = 6) -> None:
    """An installed package that must never be imported."""
    definitions = "".join(
        f'\ndef f{i}():\n    """{_prose(f"{name}{i}")}"""\n    raise SystemExit\n' for i in range(functions)
    )
    body = f'"""{_prose(name)}"""\nraise RuntimeError("imported")\n{definitions}'
    (root / name / "tests").mkdir(parents=True)
    (root / name / "__init__.py").write_text(body)
    (root / name / "tests" / "test_it.py").write_text(f'"""{_prose(name + "tests")}"""\n')
    info = root / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n# {name}\n\n{_prose(name + 'description')}\n"
    )
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}/tests/test_it.py,,\n../../bin/{name}.py,,\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    root = tmp_path / "somewhere" / "site-packages"
    for number in range(30):
        _package(root, f"pack{number:02d}")
    return root


@pytest.fixture
def cached(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The fake packages are what is installed."""
    monkeypatch.setattr(make_corpus, "find_installation", lambda: find_installation([site]))
    yield site.parent.parent / "cache"


def _rows(directory: Path, split: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for path in sorted(directory.glob(f"*-{split}.*.json.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_docstrings_of_source() -> None:
    source = b'''# -*- coding: latin-1 -*-
"""Module \xe4."""
class A:
    """Class."""
    async def f(self):
        """Method."""
        def inner():
            """Not read."""
    x = """Not a docstring."""
def g(): "Half a pair: \\ud800"
'''
    assert list(docstrings(source)) == [
        ("", "Module ä."),
        ("A", "Class."),
        ("A.f", "Method."),
        ("g", "Half a pair: ?"),
    ]


@pytest.mark.parametrize("source", [b"def (:", b"\0", b"\xff\xfe", b"# coding: nonsense\n", b"(" * 5000])
def test_source_that_is_not_python_has_no_docstrings(source: bytes) -> None:
    assert list(docstrings(source)) == []


def test_invalid_escapes_are_silent(recwarn: pytest.WarningsRecorder) -> None:
    assert list(docstrings(b'"""A \\d in it."""')) == [("", "A \\d in it.")]
    assert not recwarn.list


def test_topics() -> None:
    source = b"# -*- coding: utf-8 -*-\ntopics = {'b': 'Text of b.', 'a': 'Text ' 'of a.'}\n"
    assert list(docstrings(source, is_topics=True)) == [("a", "Text of a."), ("b", "Text of b.")]


def test_packages_are_read_and_not_imported(site: Path) -> None:
    before = set(sys.modules)
    documents = list(raw_documents(find_packages(find_installation([site]))))
    assert {d.source for d in documents} == {f"pack{i:02d}" for i in range(30)}
    assert not {name for name in set(sys.modules) - before if name.startswith("pack")}
    urls = {d.url for d in documents}
    assert {"python://pack00/__init__.py#", "python://pack00/__init__.py#f1", "python://pack00#description"} <= urls
    assert len(urls) == 30 * 8
    assert not any("tests" in url or "bin" in url or str(site) in url for url in urls)


def test_files_of_little_prose_and_deleted_files_are_skipped(site: Path) -> None:
    _package(site, "code")
    (site / "code" / "__init__.py").write_text('"""' + _prose("x") + '"""\n' + "x = 1\n" * 1000)
    (site / "pack00" / "__init__.py").unlink()
    sources = [d for d in raw_documents(find_packages(find_installation([site]))) if d.source in {"code", "pack00"}]
    assert {d.url for d in sources} == {"python://code#description", "python://pack00#description"}


def test_bound_of_source_per_package(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_MAX_PACKAGE_BYTES", 100)
    documents = list(raw_documents(find_packages(find_installation([site]))))
    assert {d.url.partition("#")[2] for d in documents} == {"description"}


def test_editable_installations_and_the_project_itself_are_left_out(site: Path) -> None:
    fingerprint = find_installation([site]).fingerprint()
    _package(site, "sltrain_dist")
    _package(site, "mine")
    (site / "mine-1.0.dist-info" / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
    installation = find_installation([site])
    assert installation.fingerprint() == fingerprint
    assert not {"mine", "sltrain_dist"} & {package.name for package in find_packages(installation)}


def test_fingerprint_depends_on_versions_and_rules(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = [find_installation([site]).fingerprint()]
    _package(site, "another", version="1.0")
    fingerprints.append(find_installation([site]).fingerprint())
    (site / "another-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.1\n")
    fingerprints.append(find_installation([site]).fingerprint())
    monkeypatch.setattr(embedded, "EXTRACTION_VERSION", -1)
    fingerprints.append(find_installation([site]).fingerprint())
    assert len(set(fingerprints)) == 4


def test_standard_library_is_found() -> None:
    installation = find_installation()
    assert ("python", sys.version.split()[0]) in installation.versions()
    assert installation.standard_library and (installation.standard_library / "json").is_dir()


def test_corpus_of_packages(site: Path, tmp_path: Path) -> None:
    manifest = build_corpus_of_packages(find_installation([site]), tmp_path / "out", num_shards=3)
    rows = {split: _rows(tmp_path / "out", split) for split in ("train", "validation")}
    assert {split: len(r) for split, r in rows.items()} == {s: c.documents for s, c in manifest.splits.items()}
    packages = {s: {r["url"].split("//")[1].split("/")[0].split("#")[0] for r in rs} for s, rs in rows.items()}
    assert packages["train"] and packages["validation"]
    assert not packages["train"] & packages["validation"]
    assert len(packages["train"] | packages["validation"]) == 30
    share = len(rows["validation"]) / (len(rows["train"]) + len(rows["validation"]))
    assert 0.03 <= share <= 0.08
    assert all(set(row) == {"text", "timestamp", "url"} for row in rows["train"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "embedded-train.00000-of-00003.json.gz",
        "embedded-train.00001-of-00003.json.gz",
        "embedded-train.00002-of-00003.json.gz",
        "embedded-validation.00000-of-00001.json.gz",
        MANIFEST,
    ]
    stored = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert stored["inputs"] == [f"pack{i:02d} 1.0" for i in range(30)]
    assert sum(sum(counts.values()) for counts in stored["sources"].values()) == len(rows["train"] + rows["validation"])
    assert stored["fingerprint"] == manifest.fingerprint


def test_two_builds_in_different_places_are_identical(site: Path, tmp_path: Path) -> None:
    build_corpus_of_packages(find_installation([site]), tmp_path / "first")
    elsewhere = tmp_path / "elsewhere" / "dist-packages"
    elsewhere.parent.mkdir()
    site.rename(elsewhere)
    time.sleep(1.1)  # gzip's header counts seconds
    build_corpus_of_packages(find_installation([elsewhere]), tmp_path / "second")
    assert _contents(tmp_path / "first") == _contents(tmp_path / "second")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_validation_is_never_empty_and_never_all(tmp_path: Path, count: int) -> None:
    root = tmp_path / "site-packages"
    for number in range(count):
        _package(root, f"p{number}", functions=3 * number + 1)
    if count == 1:
        with pytest.raises(DataError, match="two packages"):
            build_corpus_of_packages(find_installation([root]), tmp_path / "out")
        return
    manifest = build_corpus_of_packages(find_installation([root]), tmp_path / "out")
    assert set(manifest.splits) == {"train", "validation"}


def test_embedded_is_built_once_and_tokenizers_are_added(cached: Path) -> None:
    lines: list[str] = []
    first = build_embedded(cached, 300, report=lines.append)
    assert len(lines) == 3
    (directory,) = (path for path in cached.iterdir() if path.is_dir())
    assert sorted(str(p) for p in directory.glob("*.gz")) == sorted(
        str(p) for pattern in (first.train_glob, first.validation_glob) for p in directory.glob(Path(pattern).name)
    )
    assert Tokenizer(first.tokenizer).vocab_size == 300
    before = _contents(directory)
    lines.clear()
    assert build_embedded(cached, 300, report=lines.append) == first
    assert lines == []
    other = build_embedded(cached, 305, report=lines.append)
    assert Tokenizer(other.tokenizer).vocab_size == 305 and other.train_glob == first.train_glob
    assert len(lines) == 1
    assert before.items() <= _contents(directory).items()


def test_embedded_with_a_shard_missing_is_built_again(cached: Path) -> None:
    corpus = build_embedded(cached, 300)
    directory = corpus.tokenizer.parent
    before = _contents(directory)
    next(directory.glob("*-train.*")).unlink()
    assert not is_complete(directory)
    build_embedded(cached, 300)
    assert _contents(directory) == before


def test_embedded_vocabulary_too_large_and_unwritable_cache(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=9000: .*too large"):
        build_embedded(cached, 9000)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        build_embedded(tmp_path / "file", 300)


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "sltrain_dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "sltrain_dist"


def _build_in_process(site: str, cache: str, barrier: Any, results: Any) -> None:
    make_corpus.find_installation = lambda: find_installation([Path(site)])  # type: ignore[assignment]
    barrier.wait()
    lines: list[str] = []
    corpus = build_embedded(Path(cache), 300, report=lines.append)
    results.put((str(corpus.tokenizer), len(lines), Tokenizer(corpus.tokenizer).fingerprint))


@pytest.mark.slow
def test_processes_that_build_at_once(site: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (str(site), str(tmp_path / "cache"), barrier, results)
    processes = [context.Process(target=_build_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({(path, fingerprint) for path, _, fingerprint in found}) == 1
    told = sorted(lines for _, lines, _ in found)
    assert told[-1] == 3, "one builds"
    assert told[1] <= 1, "the others wait, and say so if it is not done yet"
    assert not list((tmp_path / "cache").glob("*.incomplete"))


def test_a_long_build_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_corpus, "_REPORT_EVERY_S", 0.0)
    documents = [Document(str(number), "url", "source") for number in range(3)]
    lines: list[str] = []
    assert list(make_corpus._reported(documents, lines.append)) == documents
    assert lines == [f"{count} docstrings and descriptions so far" for count in (1, 2, 3)]
    monkeypatch.setattr(make_corpus, "_REPORT_EVERY_S", 60.0)
    assert list(make_corpus._reported(documents, lines.append)) == documents
    assert len(lines) == 3


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def documents() -> Iterator[tuple[shards.Split, Document]]:
        yield "train", Document("One.", "u", "s")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), writing_directory(tmp_path / "out") as temporary:
        write_corpus(temporary, documents(), CorpusManifest("x", []), num_shards=2, dropped=Counter())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing a file writes what is left of it, and fails as the write before did."""

    def full(writer: object, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    documents: list[tuple[shards.Split, Document]] = [("train", Document("One.", "u", "s"))]
    monkeypatch.setattr(shards._SplitWriter, "write", full)
    monkeypatch.setattr(shards._SplitWriter, "close", full)
    refused = pytest.raises(StorageError, match=r"cannot write to .*: No space left on device")
    with refused, writing_directory(tmp_path / "out") as temporary:
        write_corpus(temporary, documents, CorpusManifest("x", []), num_shards=2, dropped=Counter())
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_appears_meanwhile(site: Path, tmp_path: Path) -> None:
    """That of another process is as good if both make the embedded corpus, and is left alone if not."""

    def appear(line: str) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("")

    (tmp_path / "in.txt").write_text(_page("a") + "\n" + _page("b"))
    options = PrepareOptions(InputOptions(txt_unit="paragraph"))
    with pytest.raises(DataError, match=r"cannot make .*out: "):
        prepare_files([str(tmp_path / "in.txt")], tmp_path / "out", options, report=appear)
    build_corpus_of_packages(find_installation([site]), tmp_path / "out", report=appear)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert list(tmp_path.glob(".*")) == []


def _page(seed: str) -> str:
    return _prose(seed, 3).replace(". ", ".\n") + "\nMenu\n"


def test_files_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text(_page("a") + "\n" + _page("b"))
    row = json.dumps({"body": _page("c"), "url": "https://c"})
    (tmp_path / "in" / "b.jsonl").write_text(row + "\n\n")
    (tmp_path / "in" / "deep" / "c.json.gz").write_bytes(gzip.compress(json.dumps({"body": _page("d")}).encode()))
    paths = find_inputs([str(tmp_path / "in" / "**"), str(tmp_path / "in" / "a.txt")])
    assert [Path(path).name for path in paths] == ["a.txt", "b.jsonl", "c.json.gz"]
    inputs = InputOptions(text_field="body", txt_unit="paragraph")
    documents = [d for p in paths for d in read_documents(p, inputs)]
    assert [d.url for d in documents] == ["file:a.txt#0", "file:a.txt#1", "https://c", "file:c.json.gz#0"]
    assert [d.text for d in documents] == [_page(s) for s in "abcd"]
    assert len(list(read_documents(paths[0]))) == 1

    options = PrepareOptions(inputs, validation_fraction=0.5, num_shards=2)
    manifest = prepare_files([str(tmp_path / "in" / "**")], tmp_path / "out", options, name="mine")
    kept = [row["text"] for split in ("train", "validation") for row in _rows(tmp_path / "out", split)]
    assert sorted(kept) == sorted(_page(s).replace("\nMenu\n", "") for s in "abcd")
    assert manifest.inputs[1] == {"file": "b.jsonl", "bytes": len(row) + 2}
    assert set(manifest.splits) == {"train", "validation"}


def _write_txt(directory: Path, count: int) -> str:
    directory.mkdir()
    for number in range(count):
        (directory / f"{number:03d}.txt").write_text(_prose(f"doc{number}"))
    return str(directory / "*.txt")


def test_split_is_by_text_and_repeatable(tmp_path: Path) -> None:
    pattern = _write_txt(tmp_path / "in", 200)
    options = PrepareOptions(validation_fraction=0.2)
    manifest = prepare_files([pattern], tmp_path / "a", options)
    prepare_files([pattern], tmp_path / "b", options)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    assert 20 <= manifest.splits["validation"].documents <= 60
    assert set(prepare_files([pattern], tmp_path / "c", PrepareOptions(validation_fraction=0)).splits) == {"train"}


def test_few_documents_make_few_shards_but_both_splits(tmp_path: Path) -> None:
    prepare_files([_write_txt(tmp_path / "in", 3)], tmp_path / "out", PrepareOptions(num_shards=8))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gz")) == [
        "corpus-train.00000-of-00002.json.gz",
        "corpus-train.00001-of-00002.json.gz",
        "corpus-validation.00000-of-00001.json.gz",
    ]


def test_duplicates_across_files_and_no_dedup(tmp_path: Path) -> None:
    pattern = _write_txt(tmp_path / "in", 4)
    (tmp_path / "in" / "copy.txt").write_text(_prose("doc1"))
    assert prepare_files([pattern], tmp_path / "a", PrepareOptions()).dropped == {"duplicate": 1}
    assert prepare_files([pattern], tmp_path / "b", PrepareOptions(dedup=False)).dropped == {}


def test_wrapped_text_needs_unwrap(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        wrapped = "\n".join(" ".join(words) for words in zip(*[iter(_prose(name, 7).split())] * 7, strict=True))
        (tmp_path / "in" / f"{name}.txt").write_text(wrapped.replace(".\n", ". \n"))
    pattern = str(tmp_path / "in" / "*")
    with pytest.raises(DataError, match=r"(?s)too few sentences|no line passes.*--unwrap"):
        prepare_files([pattern], tmp_path / "a", PrepareOptions())
    assert not (tmp_path / "a").exists()
    prepare_files([pattern], tmp_path / "b", PrepareOptions(unwrap=True))
    assert _rows(tmp_path / "b", "train")[0]["text"] == _prose("b", 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        (b'{"body": "x"}\n', r"line 1: no text under 'text' \(its keys: body\)"),
        (b"[1]\n", "line 1: JSON of type list; expected one object per line"),
        (b'{"text": 3}\n', "line 1: no text"),
        (b'{"text": "\xff"}\n', "line 1: not UTF-8; .*--encoding"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(str(tmp_path / "x.jsonl")))


def _kept(directory: Path, *patterns: str, **options: Any) -> list[str]:
    """The documents of a corpus made of the patterns without any rules."""
    prepared = PrepareOptions(InputOptions(**options), clean=False, dedup=False)
    prepare_files([str(directory / pattern) for pattern in patterns], directory / "out", prepared)
    return sorted(row["text"] for split in ("train", "validation") for row in _rows(directory / "out", split))


@pytest.mark.parametrize(
    ("content", "message", "encoding"),
    [
        ("Un café.".encode("latin-1"), r"x\.txt is not UTF-8 text \(.*byte 0xe9\); .*--encoding", "latin-1"),
        ("Un cafe.".encode("utf-16-le"), r"x\.txt contains NUL characters.*--encoding", "utf-16-le"),
        ("Un café.".encode("cp1252"), "is not utf-16 text", None),
        (b"\0\1\2" * 99, "contains NUL characters", None),
        (b"\x80\x81\xfe", "is not UTF-8 text", None),
    ],
)
def test_text_that_is_not_utf_8(tmp_path: Path, content: bytes, message: str, encoding: str | None) -> None:
    """Refused with its name, and read in its own encoding where that is given."""
    (tmp_path / "x.txt").write_bytes(content)
    (tmp_path / "y.txt").write_bytes(content)
    wrong = "utf-16" if "utf-16 text" in message else None
    for unit in ("file", "paragraph"):
        with pytest.raises(DataError, match=message):
            _kept(tmp_path, "*.txt", encoding=wrong, txt_unit=unit)
    assert not (tmp_path / "out").exists()
    if encoding is not None:
        assert _kept(tmp_path, "*.txt", encoding=encoding) == [content.decode(encoding)] * 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_no_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.txt").write_bytes("Éins.\r\nZwei.\rDrei.".encode(encoding))
    row = json.dumps({"text": "Vier ü."}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_bytes(f"{row}\n\n{row}\n".encode(encoding))
    assert _kept(tmp_path, "x.*") == ["Vier ü.", "Vier ü.", "Éins.\nZwei.\nDrei."]


def test_json_lines_in_latin_1(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"text": "é"}\n{"text": "ü"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: not UTF-8; .*--encoding"):
        _kept(tmp_path, "x.jsonl")
    assert _kept(tmp_path, "x.jsonl", encoding="latin-1") == ["é", "ü"]


@pytest.mark.parametrize("encoding", ["klingon", "hex", "utf-8\0"])
def test_encodings_that_are_none(encoding: str) -> None:
    with pytest.raises(ConfigError, match="--encoding"):
        InputOptions(encoding=encoding)


def test_every_compression_and_tables(tmp_path: Path) -> None:
    row = json.dumps({"text": "a", "number": 10**4000}).replace("0" * 4000, "0" * 5000).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(row) + zstd.compress(b"\n" + row.replace(b'"a"', b'"b"')))
    (tmp_path / "c.txt.zst").write_bytes(zstd.compress(b"c"))
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(b"d") + bytes(4))
    (tmp_path / "e.text.bz2").write_bytes(bz2.compress(b"e"))
    pq.write_table(pa.table({"text": pa.array(["f", "g"], pa.string_view())}), tmp_path / "f.parquet")
    assert _kept(tmp_path, ".") == ["a", "b", "c", "d", "e", "f", "g"]
    (tmp_path / "c.txt.zst").write_bytes(zstd.compress(b"c" * 1000)[:-3])
    with pytest.raises(DataError, match=r"c\.txt\.zst.*truncated"):
        list(read_documents(str(tmp_path / "c.txt.zst")))


def test_rows_without_text_are_empty_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b", ""]}), tmp_path / "a.parquet")
    prepared = PrepareOptions(clean=False, dedup=False)
    manifest = prepare_files([str(tmp_path / "a.parquet")], tmp_path / "out", prepared)
    assert manifest.dropped == {"empty": 2}


def test_the_limit_of_length(tmp_path: Path) -> None:
    options = [InputOptions(unit, max_document_bytes=30) for unit in ("file", "paragraph")]
    (tmp_path / "x.txt").write_text("é" * 14 + "\n\n" + "ü" * 15)
    with pytest.raises(DataError, match=r"x\.txt has a document of more than 30 bytes.*--txt-unit paragraph"):
        list(read_documents(str(tmp_path / "x.txt"), options[0]))
    assert [len(d.text) for d in read_documents(str(tmp_path / "x.txt"), options[1])] == [15, 15]
    (tmp_path / "x.txt").write_text("ü" * 16)
    with pytest.raises(DataError, match="more than 30 bytes"):
        list(read_documents(str(tmp_path / "x.txt"), options[1]))
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "' + "a" * 30 + '"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: more than 30 bytes"):
        list(read_documents(str(tmp_path / "x.jsonl"), options[0]))


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    for name in (b"caf\xe9.txt", b"caf\xea.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(name[:3])
    lines: list[str] = []
    options = PrepareOptions(clean=False, dedup=False)
    manifest = prepare_files([str(tmp_path / "*.txt")], tmp_path / "out", options, report=lines.append)
    assert manifest.inputs == [{"file": "caf\\udce9.txt", "bytes": 3}, {"file": "caf\\udcea.txt", "bytes": 3}]
    assert [row["url"] for row in _rows(tmp_path / "out", "train")] == ["file:caf\\udcea.txt#0"]
    assert all(line.isascii() for line in lines)


def test_damaged_gzip_and_lone_surrogates(tmp_path: Path) -> None:
    compressed = gzip.compress(b'{"text": "' + random.Random(0).randbytes(500).hex().encode() + b'"}\n')
    (tmp_path / "cut.json.gz").write_bytes(compressed[:-40])
    with pytest.raises(DataError, match=r"cannot read .*cut\.json\.gz"):
        list(read_documents(str(tmp_path / "cut.json.gz")))
    (tmp_path / "half.jsonl").write_text('{"text": "half \\ud800 a pair"}\n')
    assert [d.text for d in read_documents(str(tmp_path / "half.jsonl"))] == ["half ? a pair"]


def test_inputs_and_outputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches.*check --input"):
        find_inputs([str(tmp_path / "*.txt")])
    with pytest.raises(DataError, match="holds no"):
        find_inputs([str(tmp_path)])
    (tmp_path / "x.log").write_text("")
    with pytest.raises(ConfigError, match="unknown kind of file"):
        find_inputs([str(tmp_path / "x.log")])
    pattern = _write_txt(tmp_path / "in", 3)
    with pytest.raises(ConfigError, match="already exists"):
        prepare_files([pattern], tmp_path / "in", PrepareOptions())
    (tmp_path / "empty").mkdir()
    prepare_files([pattern], tmp_path / "empty", PrepareOptions())
    assert is_complete(tmp_path / "empty")
