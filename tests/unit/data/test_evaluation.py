"""Evaluation rows: the same documents, in file order, every token once."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from sltrain_dist.config.schema import EvalConfig
from sltrain_dist.data.evaluation import evaluation_rows
from sltrain_dist.data.stream.rows import PADDING, count_tokens
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.errors import DataError
from sltrain_dist.models.loss import IGNORE
from sltrain_dist.train.evaluate import evaluate
from tests.support.data import BATCHINGS, NumberTokenizer, data_config, write_numbered, write_shard
from tests.support.ranks import on_ranks


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


class PairCounter:
    """An engine whose loss is the number of labels, and which notes every (input, label)."""

    def __init__(self):
        self.pairs = Counter()
        self.positions = set()
        self.passes = 0

    def evaluate(self, input_ids, labels, positions):
        self.passes += 1
        counts = labels != IGNORE
        self.pairs.update(zip(input_ids[counts].tolist(), labels[counts].tolist(), strict=True))
        if positions is not None:
            self.positions.update(zip(input_ids[counts].tolist(), positions[counts].tolist(), strict=True))
        return counts.sum().double()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batching", list(BATCHINGS))
def test_every_rank_count_evaluates_every_token_once(tmp_path, batching, ranks):
    """From the files to the sums over ranks, which have padded rows, and not as many each."""
    sizes = [17, 36]
    config = data_config(**BATCHINGS[batching])
    rows = rows_of(write_numbered(tmp_path, sizes, length), **BATCHINGS[batching])
    documents = [[number] * length(number) + [0] for number in range(1, sum(sizes) + 1)]
    pieces = {
        "pad": [document[: config.seq_len] for document in documents],
        "pad, eos": [[*document[: config.seq_len - 1], 0][: len(document)] for document in documents],
        "pack": [[token for document in documents for token in document]],
        "marked": documents,
    }[batching]
    expected = Counter(pair for piece in pieces for pair in pairwise(piece))
    assert PADDING in rows
    assert all(len(rows) % several for several in (2, 3, 5)), "the ranks have as many rows each"
    for micro_batch in (1, 4):

        def on_rank(env, micro_batch=micro_batch):
            engine = PairCounter()
            return evaluate(engine, rows, micro_batch, env, reset_attention=config.reset_attention), engine

        results = on_ranks(ranks, on_rank)
        assert sum((engine.pairs for _, engine in results), Counter()) == expected
        assert {(result.tokens, result.loss) for result, _ in results} == {(expected.total(), 1.0)}
        assert len({engine.passes for _, engine in results}) == 1
        positions = set().union(*(engine.positions for _, engine in results))
        assert bool(positions) == (batching == "marked")
        assert {place for token, place in positions if token == 10} <= set(range(11))  # document 10 has 11 tokens


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
    with pytest.raises(DataError, match="does not exist"):
        rows_of([str(tmp_path / "missing.json")])


@pytest.mark.parametrize("model", ["t5-32k", "mistral-v1-32k"])
def test_prefixes_give_the_tokens_of_whole_documents(shared_data, model):
    """What pad mode makes of a cut text is what the whole text begins with, on real text and tokenizers."""
    tokenizer = Tokenizer(shared_data / "tokenizers" / f"{model}.model")
    from itertools import islice

    from sltrain_dist.data.documents import encode_documents
    from sltrain_dist.data.sources.resolve import read_documents

    cut = 0
    for name in ("c4/c4-validation.00000.json.gz", "text/gutenberg.00000.json.gz"):
        lines = list(islice(read_documents(str(shared_data / name), "text"), 60))
        for seq_len in (16, 64):
            short = encode_documents(lines, tokenizer, "text", seq_len)
            whole = encode_documents(lines, tokenizer, "text", None)
            for (_, some), (_, every) in zip(short, whole, strict=True):
                assert np.array_equal(some[:seq_len], every[:seq_len])
                cut += len(some) < len(every)
    assert cut > 80


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
