"""Evaluation rows: the same documents, in file order, every token once."""

import json

import numpy as np
import pytest

from sltrain_dist.config.schema import EvalConfig
from sltrain_dist.data.batching import PADDING, count_tokens
from sltrain_dist.data.evaluation import evaluation_rows
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.errors import DataError
from tests.unit.data_helpers import NumberTokenizer, data_config, write_numbered, write_shard


def rows_of(shards, tokens=10**7, **changes):
    return evaluation_rows(EvalConfig(tokens=tokens), data_config(**changes), shards, NumberTokenizer())


def length(number):
    return number % 11 + 1


def test_pad_is_in_file_order(tmp_path):
    rows = rows_of(write_numbered(tmp_path, [5, 7], length))
    assert rows.dtype == np.int32
    assert rows.shape == (12, 9)
    assert rows[:, 0].tolist() == list(range(1, 13))
    assert count_tokens(rows) == sum(min(length(number) + 1, 8) for number in range(1, 13))


def test_pack_has_every_token_once(tmp_path):
    rows = rows_of(write_numbered(tmp_path, [5, 7], length), batching="pack")
    text = [token for number in range(1, 13) for token in [number] * length(number) + [0]]
    targets = rows[:, 1:].ravel()
    assert targets[targets != PADDING].tolist() == text[1:]
    assert rows[0, 0] == text[0]


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_stops_at_the_row_that_reaches_the_tokens(tmp_path, batching):
    shards = write_numbered(tmp_path, [50, 70], length)
    whole = rows_of(shards, batching=batching)
    some = rows_of(shards, tokens=100, batching=batching)
    assert np.array_equal(some, whole[: len(some)])
    assert count_tokens(some[:-1]) < 100 <= count_tokens(some)


def test_faults(tmp_path):
    texts = [str(number) for number in range(1, 200)]
    few = write_shard(tmp_path / "few.json.gz", texts, raw=[b"garbage"])
    assert len(rows_of([few])) == 199
    many = write_shard(tmp_path / "many.json.gz", texts, raw=[b"garbage"] * 5)
    with pytest.raises(DataError, match=r"evaluation data: 5 of 204 .*line 200 of .*many\.json\.gz"):
        rows_of([many])
    with pytest.raises(DataError, match=r"no usable document for evaluation in .*none\.jsonl"):
        rows_of([write_shard(tmp_path / "none.jsonl", [])])
    with pytest.raises(DataError, match="is not there"):
        rows_of([str(tmp_path / "missing.json")])


@pytest.mark.parametrize("model", ["t5-32k", "mistral-v1-32k"])
def test_prefixes_give_the_tokens_of_whole_documents(shared_data, model):
    """What pad mode makes of a cut text is what the whole text begins with, on real text and tokenizers."""
    tokenizer = Tokenizer(shared_data / "tokenizers" / f"{model}.model")
    from itertools import islice

    from sltrain_dist.data.documents import encode_documents
    from sltrain_dist.data.source import read_documents

    cut = 0
    for name in ("c4/c4-validation.00000.json.gz", "text/gutenberg.00000.json.gz"):
        lines = list(islice(read_documents(str(shared_data / name), "text"), 150))
        for seq_len in (16, 64):
            short = encode_documents(lines, tokenizer, "text", seq_len)
            whole = encode_documents(lines, tokenizer, "text", None)
            for (_, some), (_, every) in zip(short, whole, strict=True):
                assert np.array_equal(some[:seq_len], every[:seq_len])
                cut += len(some) < len(every)
    assert cut > 200


def test_real_c4(shared_data):
    """The share of a padded batch that is text is C4's at 256 tokens, and packing leaves no padding."""
    tokenizer = Tokenizer(shared_data / "tokenizers" / "t5-32k.model")
    shard = str(shared_data / "c4" / "c4-validation.00000.json.gz")
    rows = {
        batching: evaluation_rows(
            EvalConfig(tokens=10**7), data_config(seq_len=256, batching=batching), [shard], tokenizer
        )
        for batching in ("pad", "pack")
    }
    assert len(rows["pad"]) == 200
    assert 0.6 < count_tokens(rows["pad"]) / (256 * len(rows["pad"])) < 0.9
    assert PADDING not in rows["pack"][:-1]
    first = json.loads(next(open_gzip(shard)))["text"]
    assert tokenizer.decode(rows["pad"][0][rows["pad"][0] >= 0])[:100] == " ".join(first.split())[:100]


def open_gzip(path):
    import gzip

    return gzip.open(path)
