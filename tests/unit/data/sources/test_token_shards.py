"""Token shards: the rows of the text they were made of, restarts, damage, and the wrong tokenizer."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sltrain_dist import cli
from sltrain_dist.config.schema import EvalConfig
from sltrain_dist.data import loader as loader_module
from sltrain_dist.data.evaluation import evaluation_rows
from sltrain_dist.data.prepare import tokens as tokens_module
from sltrain_dist.data.prepare.tokens import prepare_tokens
from sltrain_dist.data.sources.resolve import resolve_source
from sltrain_dist.data.sources.token_shards import MANIFEST, ShardReader, open_manifest, read_manifest
from sltrain_dist.errors import CheckpointError, ConfigError, DataError
from tests.support.data import (
    BATCHINGS,
    NumberTokenizer,
    data_config,
    global_batches,
    make_loaders,
    saved,
    write_numbered,
    write_shard,
)

RAW = [b"not json", b'{"other": 1}', b"", b'{"text": "x"}', b'{"text": "\xff"}']
"""One line of each cause, and one that the tokenizer has no tokens for."""


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    monkeypatch.setattr(loader_module, "Tokenizer", NumberTokenizer)
    monkeypatch.setattr(tokens_module, "Tokenizer", NumberTokenizer)


@pytest.fixture
def text(tmp_path):
    """Shards of 19, 12, 7 and 33 usable documents of 1 to 30 tokens, with unusable ones among them."""
    shards = write_numbered(tmp_path, [14, 12, 7, 25], length=lambda number: 1 + 7 * number % 30)
    for shard, texts in ((shards[0], 5), (shards[3], 8)):
        extra = write_shard(tmp_path / "extra", ["9" * (1 + i % 4) for i in range(texts)], raw=RAW)
        Path(shard).write_bytes(Path(extra).read_bytes() + Path(shard).read_bytes())
        Path(extra).unlink()
    return shards


def prepare(text, output, **changes):
    return prepare_tokens(text, output, Path("unused"), max_bad_fraction=0.5, **changes)


@pytest.fixture
def prepared(text, tmp_path):
    prepare(text, tmp_path / "tokens")
    return resolve_source(str(tmp_path / "tokens"))


@hypothesis_settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None, derandomize=True
)
@given(
    batching=st.sampled_from(list(BATCHINGS)),
    streams=st.integers(1, 9),
    block=st.integers(1, 9),
    seq_len=st.integers(2, 40),
    global_batch=st.sampled_from([12, 24]),
    worlds=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 12])] * 3),
    updates=st.tuples(*[st.integers(0, 5)] * 3),
)
def test_the_rows_and_positions_of_the_text(
    text, prepared, batching, streams, block, seq_len, global_batch, worlds, updates
):
    """Also when a run goes on with another number of ranks, or changes from text to token shards or back."""
    order = {"streams": streams, "shuffle_block": block, "seq_len": seq_len}
    config = data_config(**BATCHINGS[batching], **order, max_bad_fraction=0.6)
    state_of_text = state = None
    for world, count in zip(worlds, updates, strict=True):
        of_text = make_loaders(config, text, 1, global_batch=global_batch, state=state)
        of_tokens = make_loaders(config, prepared, world, global_batch=global_batch, state=state_of_text)
        if count:
            np.testing.assert_array_equal(global_batches(of_tokens, count), global_batches(of_text, count))
        state, state_of_text = saved(of_tokens), saved(of_text)
        assert state["streams"] == state_of_text["streams"]
        if world == 1:
            assert of_tokens[0].stats.bad == of_text[0].stats.bad
            assert of_tokens[0].stats.documents == of_text[0].stats.documents


@pytest.mark.slow
def test_workers_read_token_shards(text, prepared, shared_data, tmp_path, monkeypatch):
    monkeypatch.undo()
    path = shared_data / "tokenizers" / "t5-32k.model"
    shards = resolve_source(str(shared_data / "c4" / "c4-validation.00000.json.gz"))
    prepare_tokens(shards, tmp_path / "c4", path)
    rows = {}
    for name, source, workers in (("text", shards, 0), ("tokens", resolve_source(str(tmp_path / "c4")), 2)):
        for batching in ("pad", "pack"):
            config = data_config(batching=batching, seq_len=128, workers=workers, shuffle_block=64)
            loaders = make_loaders(config, source, 1, tokenizer_path=path)
            rows[name, batching] = global_batches(loaders, 12)
            loaders[0].close()
    for batching in ("pad", "pack"):
        np.testing.assert_array_equal(rows["tokens", batching], rows["text", batching])


@pytest.mark.parametrize("batching", list(BATCHINGS))
def test_evaluation_rows_of_the_text(text, prepared, batching):
    config = data_config(**BATCHINGS[batching], max_bad_fraction=0.5)
    rows = [evaluation_rows(EvalConfig(tokens=10**6), config, shards, NumberTokenizer()) for shards in (text, prepared)]
    np.testing.assert_array_equal(*rows)


def test_the_limit_of_unusable_documents_holds(text, prepared):
    for shards in (text, prepared):
        with pytest.raises(DataError, match="documents cannot be used"):
            global_batches(make_loaders(data_config(max_bad_fraction=0.01), shards, 1), 20)


def test_what_is_stored(text, prepared, tmp_path):
    manifest = open_manifest(tmp_path / "tokens")
    assert [shard.documents for shard in manifest.shards] == [24, 12, 7, 38]
    assert manifest.shards[0].faults == {"not_json": 1, "no_text": 1, "invalid_utf8": 1, "empty": 2}
    assert manifest.job.dtype == np.uint16 and manifest.job.sources[0] == (text[0], Path(text[0]).stat().st_size)
    reader = ShardReader(manifest, 0)
    assert reader.tokens[reader.starts[0] : reader.starts[3]].tolist() == [9, 0, 99, 0, 999, 0]
    assert reader.starts[5] == reader.starts[10] and reader.fault(5).value == "not_json" and reader.fault(0) is None
    assert sum(shard.tokens for shard in manifest.shards) * 2 == sum(
        (tmp_path / "tokens" / f"{shard.name}.tokens").stat().st_size for shard in manifest.shards
    )
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {
        MANIFEST,
        *(f"{number:05d}.{suffix}" for number in range(4) for suffix in ("tokens", "index")),
    }


def test_files_that_change_in_mid_run_or_before_a_resume(prepared, tmp_path):
    config = data_config(max_bad_fraction=0.5)
    (loader,) = make_loaders(config, prepared, 1)
    next(loader)
    state = saved([loader])
    path = tmp_path / "tokens" / "00003.tokens"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=r"00003\.tokens has changed since the run began"):
        for _ in range(60):
            next(loader)
    with pytest.raises(CheckpointError, match=r"contents of the token shards \(changed: [^,]*00003\.tokens\)"):
        make_loaders(config, prepared, 1, state=state)
    path.write_bytes(content)
    (loader,) = make_loaders(config, prepared, 1, state=state)
    global_batches([loader], 20)  # by then all files are mapped
    os.truncate(path, 2)  # a read beyond the end of a mapped file would kill the process
    with pytest.raises(DataError, match=r"00003\.tokens has changed since the run began: 2 bytes"):
        for _ in range(60):
            next(loader)


def test_text_that_has_changed_since_it_was_prepared(text, prepared, tmp_path):
    """It is neither gone on with, nor does a run change over to it."""
    config = data_config(max_bad_fraction=0.5)
    state = saved(make_loaders(config, prepared, 1))
    make_loaders(config, text, 1, state=state)
    path = Path(text[2])
    path.write_bytes(path.read_bytes()[:-5] + b'1"}\n\n')
    with pytest.raises(CheckpointError, match=r"contents of data\.source \(changed: [^,]*shard-002\.jsonl\)"):
        make_loaders(config, text, 1, state=state)
    with pytest.raises(ConfigError, match="other text"):
        prepare(text, tmp_path / "tokens")


def test_token_shards_of_an_earlier_version(text, prepared, tmp_path):
    """Without contents, a limit of length, a number for its cause, and a checksum."""
    manifest = json.loads(Path(prepared[0]).read_text())
    del manifest["job"]["contents"], manifest["job"]["max_document_bytes"], manifest["checksum"]
    manifest["causes"].remove("too_long")
    Path(prepared[0]).write_text(json.dumps(manifest))
    config = data_config(max_bad_fraction=0.5)
    state = saved(make_loaders(config, text, 1))
    make_loaders(config, prepared, 1, state=state)
    prepare(text, tmp_path / "tokens")


def test_the_limit_of_length_is_that_of_the_text(tmp_path):
    shard = write_shard(tmp_path / "x.jsonl", ["1 2", "3 " * 50, *map(str, range(4, 30))])
    prepare([shard], tmp_path / "tokens", max_document_bytes=60)
    (manifest,) = resolve_source(str(tmp_path / "tokens"))
    config = data_config(max_document_bytes=60, max_bad_fraction=0.5)
    of_text, of_tokens = (make_loaders(config, [source], 1) for source in (shard, manifest))
    np.testing.assert_array_equal(global_batches(of_tokens, 9), global_batches(of_text, 9))
    assert of_tokens[0].stats.bad == of_text[0].stats.bad
    assert of_text[0].stats.bad["too_long"] > 0
    with pytest.raises(ConfigError, match=r"set data\.max_document_bytes=60"):
        make_loaders(data_config(max_bad_fraction=0.5), [manifest], 1)


def test_large_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(NumberTokenizer, "vocab_size", (1 << 16) + 1)
    big, none = write_shard(tmp_path / "big.jsonl", ["65536 3"]), write_shard(tmp_path / "none.jsonl", [])
    manifest = prepare([big, none], tmp_path / "tokens")
    assert ShardReader(manifest, 1).documents == len(ShardReader(manifest, 1).tokens) == 0
    assert ShardReader(manifest, 0).tokens.tolist() == [65536, 3, 0] and manifest.job.dtype == np.uint32


class _Stopped(BaseException):
    """A kill, in so far as nothing handles it."""


@pytest.mark.parametrize("at", ["00002.tokens", "00002.index", "00002.shard.json", MANIFEST])
def test_an_interrupted_preparation_goes_on(text, tmp_path, monkeypatch, at):
    whole = prepare(text, tmp_path / "whole")
    output = tmp_path / "tokens"
    rename = Path.rename
    started = []

    def stop(path, target):
        if Path(target).name == at and (at != MANIFEST or started):
            raise _Stopped
        if Path(target).name == MANIFEST:
            started.append(True)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(_Stopped):
            prepare(text, output)
    with pytest.raises(DataError, match="not finished"):
        resolve_source(str(output))
    made = []
    original = tokens_module._make_shard
    monkeypatch.setattr(tokens_module, "_make_shard", lambda task: made.append(task.number) or original(task))
    assert prepare(text, output).shards == whole.shards
    assert made == ([] if at == MANIFEST else [2, 3])
    for path in (tmp_path / "whole").iterdir():
        if path.name != MANIFEST:
            assert path.read_bytes() == (output / path.name).read_bytes()


def test_what_a_killed_command_has_left_running_spoils_nothing(text, tmp_path, monkeypatch):
    """Its process makes a shard that the next command makes at the same time."""
    whole = prepare(text, tmp_path / "whole")
    output = tmp_path / "tokens"
    encode = tokens_module.encode_documents
    orphans = []

    def encode_and_meet_another(*arguments):
        results = list(encode(*arguments))
        yield from results[:3]
        if not orphans:
            orphans.append(None)
            orphans[0] = tokens_module._make_shard(tokens_module._Task(output, 0, Path("unused"), whole.job))
        yield from results[3:]

    monkeypatch.setattr(tokens_module, "encode_documents", encode_and_meet_another)
    assert prepare(text, output).shards == whole.shards
    assert orphans[0] == whole.shards[0]
    assert verify(monkeypatch, output) == 0
    (output / ".00009.tokens.cafe.tmp").touch()
    prepare(text, output)
    assert not list(output.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("00003.tokens", lambda path: path.write_bytes(path.read_bytes()[:-2])),
        ("00000.index", lambda path: path.unlink()),
        ("00003.tokens", lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])),
    ],
)
def test_damage_is_named_and_repaired(text, prepared, tmp_path, capsys, monkeypatch, name, spoil):
    output = tmp_path / "tokens"
    before = (output / name).read_bytes()
    spoil(output / name)
    same_size = (output / name).exists() and (output / name).stat().st_size == len(before)
    if not same_size:  # else only the hash tells, which is not compared at the start of a run
        with pytest.raises(DataError, match=name):
            resolve_source(str(output))
        with pytest.raises(DataError, match=name):
            global_batches(make_loaders(data_config(max_bad_fraction=0.5), prepared, 1), 9)
    assert verify(monkeypatch, output) == 3 and name in capsys.readouterr().err
    prepare(text, output)
    assert (output / name).read_bytes() == before
    assert verify(monkeypatch, output) == 0 and "intact" in capsys.readouterr().out


def verify(monkeypatch, directory):
    monkeypatch.setattr("sys.argv", ["sltrain", "verify", str(directory)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_another_tokenizer_or_field_is_refused(text, prepared, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.text_field=text"):
        make_loaders(data_config(text_field="body"), prepared, 1)
    monkeypatch.setattr(NumberTokenizer, "fingerprint", "another")
    with pytest.raises(ConfigError, match="0123456789abcdef"):
        make_loaders(data_config(), prepared, 1)
    with pytest.raises(ConfigError, match="length limit or tokenizer"):
        prepare(text, tmp_path / "tokens")


def test_misuse_is_refused(text, prepared, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no token shards"):
        prepare(text, tmp_path / "other")
    with pytest.raises(ConfigError, match="other text"):
        prepare(text[:2], tmp_path / "tokens")
    with pytest.raises(ConfigError, match="already"):
        prepare(prepared, tmp_path / "again")
    with pytest.raises(DataError, match="only source"):
        resolve_source([text[0], str(tmp_path / "tokens")])
    for entry in ("tokens/*", "tokens/00000.tokens"):
        with pytest.raises(DataError, match=r"token shards; set data\.source to their directory .*/tokens alone"):
            resolve_source(str(tmp_path / entry))
    with pytest.raises(DataError, match=r"more than data\.max_bad_fraction=0\.01"):
        prepare_tokens(text, tmp_path / "bad", Path("unused"))
    with tokens_module._locked_directory(tmp_path / "tokens"), pytest.raises(ConfigError, match="another process"):
        prepare(text, tmp_path / "tokens")


def test_a_checkpoint_of_rebuilt_token_shards_is_refused(prepared):
    config = data_config(max_bad_fraction=0.5)
    state = saved(make_loaders(config, prepared, 1))
    manifest = json.loads(Path(prepared[0]).read_text())
    manifest["job"]["sources"][0][1] += 1
    del manifest["checksum"]  # as in older manifests
    Path(prepared[0]).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"bytes of data\.source"):
        make_loaders(config, prepared, 1, state=state)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(shards=None),
        lambda m: m.update(shards=m["shards"][1:]),
        lambda m: m.update(dtype="uint32"),
        lambda m: m.update(causes=["none"]),
        lambda m: m.update(jbo=m.pop("job")),
        lambda m: m["job"].update(vocab_size=-1),
        lambda m: m["job"].update(sources=[["x"]]),
        lambda m: m["shards"][0].update(name="../../x"),
        lambda m: m["shards"][0].update(tokens=1e400),
        lambda m: m["shards"][0].update(tokens=m["shards"][0]["tokens"] + 1),
        lambda m: m["shards"][0].update(files={}),
        lambda m: m["shards"][0]["files"].update({"/dev/zero": [0, "0" * 64]}),
        lambda m: m["shards"][0]["files"].update({"a\0": None}),
    ],
)
def test_manifests_that_make_no_sense(monkeypatch, capsys, prepared, edit):
    """As of a version that knew no checksums: only their sense can give them away."""
    path = Path(prepared[0])
    values = json.loads(path.read_text())
    del values["checksum"]
    path.write_text(json.dumps(values))
    assert verify(monkeypatch, path.parent) == 0
    edit(values)
    path.write_text(json.dumps(values))
    assert verify(monkeypatch, path.parent) == 3
    error = capsys.readouterr().err
    assert f"the manifest {path} cannot be read" in error and "Traceback" not in error


def test_a_flipped_bit_of_the_manifest(prepared):
    path = Path(prepared[0])
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="cannot be read"):
            read_manifest(path.parent)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[" * 100_000, b'{"name": "00001"}'])
def test_a_shards_record_that_is_damaged_is_made_again(text, prepared, content):
    """As after a preparation that was killed."""
    directory = Path(prepared[0]).parent
    whole = (directory / MANIFEST).read_bytes()
    values = {**json.loads(whole), "shards": []}
    del values["checksum"]
    (directory / MANIFEST).write_text(json.dumps(values))
    (directory / "00001.shard.json").write_bytes(content)
    prepare(text, directory)
    assert (directory / MANIFEST).read_bytes() == whole
