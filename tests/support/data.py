"""Small sources and tokenizers for the tests of the data pipeline."""

import gzip
import json
from pathlib import Path

import numpy as np

from sltrain_dist.config.schema import DataConfig
from sltrain_dist.data.loader import TrainLoader, merge_states
from sltrain_dist.data.sources.retry import Fetcher
from sltrain_dist.data.stream.corpus import open_corpus
from sltrain_dist.data.stream.virtual_stream import Stream, StreamSettings, StreamState

BATCHINGS = {
    "pad": {"batching": "pad"},
    "pad, eos": {"batching": "pad", "truncate": "eos"},
    "pack": {"batching": "pack"},
    "marked": {"batching": "pack", "reset_attention": True},
}
"""Settings of all forms that rows have."""
_START = StreamState()


class NumberTokenizer:
    """Tokenizes "12 7 12" as 12, 7, 12: rows show which documents they were made of."""

    eos_id = 0
    vocab_size = 1 << 16
    fingerprint = "0123456789abcdef"
    breaks_at_spaces = True

    def __init__(self, path=None):
        pass

    def encode(self, texts):
        return [np.array([int(word) for word in text.split() if word.isdigit()], dtype=np.int32) for text in texts]


def write_shard(path: Path, texts, *, raw=()) -> str:
    """Writes texts as JSON lines, then raw lines (bytes), gzipped if the name says so."""
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts) + b"".join(
        line + b"\n" for line in raw
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write_numbered(directory: Path, sizes, length=lambda number: 1) -> list[str]:
    """Shards of the given numbers of documents; document i (from 1) is `length(i)` times the token i."""
    number = 0
    shards = []
    for index, size in enumerate(sizes):
        texts = []
        for _ in range(size):
            number += 1
            texts.append(" ".join([str(number)] * length(number)))
        shards.append(write_shard(directory / f"shard-{index:03}.jsonl", texts))
    return shards


def settings(shards, **changes) -> StreamSettings:
    values = {
        "shards": tuple(shards),
        "text_field": "text",
        "seed": 1,
        "streams": 4,
        "batching": "pad",
        "seq_len": 8,
        "shuffle_block": 4,
        "max_bad_fraction": 0.01,
    }
    return StreamSettings(**{**values, **changes})


def text_stream(config, tokenizer, number=0, state=_START) -> Stream:
    """One virtual stream of text."""
    max_tokens = config.seq_len if config.batching == "pad" else None
    corpus = open_corpus(
        config.shards, None, tokenizer, config.text_field, max_tokens, Fetcher(), config.max_document_bytes
    )
    return Stream(config, corpus, number, state)


def data_config(**changes) -> DataConfig:
    values = {"seq_len": 8, "streams": 6, "shuffle_block": 4, "workers": 0}
    return DataConfig(**{**values, **changes})


def make_loaders(
    config, shards, world_size, *, global_batch=24, state=None, seed=3, source_sizes=(), tokenizer_path="unused"
):
    """One loader per rank."""
    return [
        TrainLoader(
            config,
            shards=shards,
            tokenizer_path=tokenizer_path,
            seed=seed,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            source_sizes=source_sizes,
            state=state,
        )
        for rank in range(world_size)
    ]


def saved(loaders):
    """The merged cursor, as it comes back from a file."""
    return json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))


def global_batches(loaders, updates):
    """The next global batches, (updates, rows, seq_len + 1), of one loader per rank."""
    return np.stack([np.concatenate([next(loader) for loader in loaders]) for _ in range(updates)])
