"""A directory means its documents of a split: not what describes them, nor what is held out of the split."""

import json
import shlex

import datasets
import fsspec
import pyarrow as pa
import pytest

from sltrain_dist.data.prepare.make_corpus import PrepareOptions, prepare_files
from sltrain_dist.data.sources.kinds import MANIFEST, Kind, codec_of, is_held_out, is_metadata, kind_of
from sltrain_dist.data.sources.resolve import read_documents, resolve_source
from sltrain_dist.errors import DataError
from tests.support.data import write_shard

METADATA = [".hidden.jsonl", "._a.jsonl", MANIFEST, "dataset_info.json", "tokenizer.json", "cache-1f.arrow"]


def names(shards):
    return sorted(shard.rpartition("/")[2] for shard in shards)


@pytest.mark.parametrize(
    ("name", "kind", "codec"),
    [
        ("a/b.jsonl.zst", Kind.LINES, "zstd"),
        ("B.JSON.GZ", Kind.LINES, "gzip"),
        ("https://host/a.json.xz?download=true&x=.txt", Kind.LINES, "xz"),
        ("a.parquet", Kind.PARQUET, None),
        ("data-00000-of-00002.arrow", Kind.ARROW, None),
        ("book.txt", Kind.PLAIN_TEXT, None),
        ("README.md.bz2", Kind.PLAIN_TEXT, "bz2"),
        ("a.tar.gz", Kind.FOREIGN, "gzip"),
        ("a.csv", Kind.FOREIGN, None),
        ("part-00000", None, None),
        ("a.json/part", None, None),
    ],
)
def test_kinds(name, kind, codec):
    assert (kind_of(name), codec_of(name)) == (kind, codec)


def test_names_that_are_held_out():
    held = ["c4-validation.00000-of-00008.json.gz", "val.jsonl", "en_test_3.jsonl", "dev-0.parquet", "Test.json"]
    other = ["validity.jsonl", "train-00000.parquet", "testament.jsonl", "invalid.jsonl", "retrieval.jsonl", "x.json"]
    assert all(map(is_held_out, held))
    assert not any(map(is_held_out, other))
    assert all(map(is_metadata, METADATA))
    assert not any(map(is_metadata, [*held, *other]))


@pytest.fixture
def mixed(tmp_path):
    """Training, validation and test files among others that are no documents."""
    documents = ["x-train.0.jsonl", "more.jsonl", "x-validation.0.jsonl", "test.jsonl"]
    for name in [*METADATA, "notes.txt", "a.csv", *documents]:
        write_shard(tmp_path / name, ["text"])
    return tmp_path


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["more.jsonl", "x-train.0.jsonl"]),
        ("validation", ["x-validation.0.jsonl"]),
        ("test", ["test.jsonl"]),
    ],
)
def test_the_documents_of_a_split(mixed, split, expected):
    """On a disk and behind a URL; what is left out is said."""
    notes = []
    assert names(resolve_source(str(mixed), split=split, report=notes.append)) == expected
    memory = fsspec.filesystem("memory")
    for path in mixed.iterdir():
        memory.pipe(f"/mixed/{path.name}", path.read_bytes())
    assert names(resolve_source("memory://mixed", split=split, report=notes.append)) == expected
    assert len(notes) == 2
    assert all("left out" in note and "include them by a glob" in note for note in notes)
    assert "test.jsonl" in notes[0] or split == "test"


def test_a_directory_of_one_split(tmp_path):
    """All of it is for evaluation, whatever the names; nothing that is called validation is trained on by accident."""
    write_shard(tmp_path / "a.jsonl", ["text"])
    assert names(resolve_source(str(tmp_path), split="validation")) == ["a.jsonl"]
    (tmp_path / "a.jsonl").rename(tmp_path / "validation.jsonl")
    with pytest.raises(DataError, match=r"all documents in the directory .*validation\.jsonl.*name them with a glob"):
        resolve_source(str(tmp_path))
    assert names(resolve_source(str(tmp_path / "*.jsonl"))) == ["validation.jsonl"]


def test_globs_take_held_out_files_but_say_so(mixed):
    notes = []
    expected = ["more.jsonl", "test.jsonl", "x-train.0.jsonl", "x-validation.0.jsonl"]
    assert names(resolve_source(str(mixed / "*.json*"), report=notes.append)) == expected
    (note,) = notes
    assert "held-out data" in note
    notes.clear()
    resolve_source(str(mixed / "x-v*"), report=notes.append)
    resolve_source(str(mixed / "*train*"), report=notes.append)
    resolve_source(str(mixed / "*.json*"), split="validation", report=notes.append)
    assert notes == []


def test_a_directory_of_a_readme_and_subdirectories(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("Text.")
    with pytest.raises(DataError, match=r"subdirectories need a glob such as '.*/\*\*/\*.json.gz'; plain text needs"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize("entry", ["{0}", "{0}/*.txt", "{0}/a.txt"])
def test_plain_text_needs_preparation(tmp_path, entry):
    (tmp_path / "a.txt").write_text("Text.")
    with pytest.raises(DataError, match=r"plain text.*`sltrain prepare-text --input") as error:
        resolve_source(entry.format(tmp_path))
    assert shlex.quote(entry.format(tmp_path)) in str(error.value)
    assert names(resolve_source(entry.format(tmp_path), with_text=True)) == ["a.txt"]


@pytest.fixture
def corpus(tmp_path):
    """What `sltrain prepare-text` makes, with a file that somebody has put beside it."""
    source = write_shard(tmp_path / "x.jsonl", [f"text number {number}" for number in range(40)])
    prepare_files([source], tmp_path / "mine", PrepareOptions(clean=False, dedup=False, num_shards=2), name="my-test")
    write_shard(tmp_path / "mine" / "other.jsonl", ["text"])
    return tmp_path / "mine"


def test_a_prepared_corpus_is_known_by_its_manifest(corpus):
    """Even where its name looks like that of held-out data."""
    train = ["my-test-train.00000-of-00002.json.gz", "my-test-train.00001-of-00002.json.gz"]
    for entry in (corpus, corpus / MANIFEST):
        notes: list[str] = []
        assert names(resolve_source(str(entry), report=notes.append)) == train
        assert len(notes) == 1
        assert "left out 1 file (other.jsonl), not in manifest.json" in notes[0]
        assert names(resolve_source(str(entry), split="validation")) == ["my-test-validation.00000-of-00001.json.gz"]
    with pytest.raises(DataError, match=r"no split 'test'; it has \['train', 'validation'\]"):
        resolve_source(str(corpus), split="test")


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_prepared_corpus_that_is_not_whole(corpus, damage):
    path = corpus / "my-test-train.00001-of-00002.json.gz"
    path.unlink() if damage == "missing" else path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"my-test-train\.00001-of-00002\.json\.gz (is missing|has 1 bytes instead of)"):
        resolve_source(str(corpus))


def test_a_manifest_of_another_program(tmp_path):
    for content in ('{"files": ["a"]}', "[1]", "no JSON", json.dumps({"tool": "another", "files": {}})):
        (tmp_path / MANIFEST).write_text(content)
        write_shard(tmp_path / "a.jsonl", ["text"])
        assert names(resolve_source(str(tmp_path))) == ["a.jsonl"]


def test_what_datasets_has_saved(tmp_path):
    """Shuffled and cut, so that the files it lies in would say something else if they were not rewritten."""
    texts = [f"text {number}" for number in range(30)]
    whole = datasets.Dataset.from_dict({"text": texts, "id": list(range(30))})
    some = whole.shuffle(seed=1).select(range(5, 25))
    some.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": whole, "validation": some}).save_to_disk(tmp_path / "two")
    (tmp_path / "one" / "cache-00.arrow").write_bytes(b"what a filter has left")

    def texts_of(source, split="train"):
        shards = resolve_source(str(source), split=split)
        return [record.decode() for shard in shards for _, record in read_documents(shard, "text")]

    assert texts_of(tmp_path / "one") == some["text"]
    assert texts_of(tmp_path / "two") == texts
    assert texts_of(tmp_path / "two", "validation") == texts_of(tmp_path / "one" / "*.arrow") == some["text"]
    with pytest.raises(DataError, match=r"no split 'test'; it has \['train', 'validation'\]"):
        resolve_source(str(tmp_path / "two"), split="test")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="`datasets` cannot read what it saved to"):
        resolve_source(str(tmp_path / "one"))


@pytest.mark.parametrize("form", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files(tmp_path, form):
    """Both formats, in parts, in batches of several sizes, local and remote."""
    texts = [f"text {number}" for number in range(50)]
    table = pa.table({"id": list(range(50)), "text": pa.array(texts, pa.large_string())})
    with form(tmp_path / "x.arrow", table.schema) as writer:
        for start, stop in ((0, 1), (1, 30), (30, 30), (30, 50)):
            writer.write_table(table.slice(start, stop - start))
    fsspec.filesystem("memory").pipe("/arrow/x.arrow", (tmp_path / "x.arrow").read_bytes())
    for shard in (str(tmp_path / "x.arrow"), "memory://arrow/x.arrow"):
        for first, step in ((0, 1), (0, 7), (29, 1), (31, 3), (50, 1)):
            found = list(read_documents(shard, "text", first, step))
            assert found == [(index, texts[index].encode()) for index in range(first, 50, step)]
    content = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"x\.arrow.*must be replaced"):
        list(read_documents(str(tmp_path / "x.arrow"), "text"))
