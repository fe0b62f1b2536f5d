"""The fixed set of rows that a run evaluates on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from sltrain_dist.config.schema import DataConfig, EvalConfig
from sltrain_dist.data.documents import SAMPLE, Encoder, Fault, Tally, TokenIds
from sltrain_dist.data.sources.retry import Fetcher, RetryPolicy
from sltrain_dist.data.sources.token_shards import manifest_for
from sltrain_dist.data.stream.corpus import open_corpus
from sltrain_dist.data.stream.rows import RowMaker, Segment, count_tokens
from sltrain_dist.errors import DataError

_BLOCK_DOCUMENTS = 64
"""Documents read at a time."""


def evaluation_rows(eval_config: EvalConfig, data: DataConfig, shards: Sequence[str], tokenizer: Encoder) -> TokenIds:
    """Returns the evaluation rows: documents in file order, batched as in training.

    With `data.batching: pack`, the last row is padded, so that every token except the very first is
    predicted exactly once; with `data.reset_attention`, every token except the first of each document.

    Args:
        eval_config: The last row is the one that reaches `tokens` non-padding tokens.
        data: How documents are read and batched.
        shards: The files that `eval.source` resolves to.
        tokenizer: The tokenizer.

    Returns:
        int32 array of shape (rows, seq_len + 1); −1 is padding; for marked first tokens see `rows.split_marks`.

    Raises:
        ConfigError: Token shards were prepared with another tokenizer, text field or document limit.
        DataError: A shard cannot be read, or too many or all documents are unusable.
    """
    rows: list[TokenIds] = []
    tokens = 0
    documents = _usable_documents(data, shards, tokenizer)
    maker = RowMaker(documents, data.batching, seq_len=data.seq_len, truncate=data.truncate, mark=data.reset_attention)
    while tokens < eval_config.tokens and len(row := maker.take(1)):
        rows.append(row)
        tokens += count_tokens(row)
    if not rows:
        raise DataError(f"no usable document for evaluation in {', '.join(shards[:3])}; check eval.source")
    return np.concatenate(rows)


def _usable_documents(data: DataConfig, shards: Sequence[str], tokenizer: Encoder) -> Iterator[Segment]:
    """Yields the usable documents one by one, so that a document counts only if a row needs it."""
    tally = Tally()
    max_tokens = data.seq_len if data.batching == "pad" else None
    prepared = manifest_for(shards, tokenizer, data.text_field, data.max_document_bytes)
    if prepared is not None:
        shards = [name for name, _ in prepared.job.sources]
    fetcher = Fetcher(RetryPolicy.of(data))
    corpus = open_corpus(shards, prepared, tokenizer, data.text_field, max_tokens, fetcher, data.max_document_bytes)
    for number, shard in enumerate(shards):
        blocks = corpus.blocks(number, 0, 1, _BLOCK_DOCUMENTS)
        for line, segment in chain.from_iterable(block.segments(np.arange(len(block))) for block in blocks):
            for result in (segment,) if isinstance(segment, Fault) else segment.documents():
                tally.add(shard, line, result)
                if tally.documents >= SAMPLE and tally.exceeds(data.max_bad_fraction):
                    raise tally.error("the evaluation data", data.max_bad_fraction, data.text_field)
                if isinstance(result, Segment):
                    yield result
    if tally.exceeds(data.max_bad_fraction):
        raise tally.error("the evaluation data", data.max_bad_fraction, data.text_field)
