"""The check that a study's data are there before its first trial starts (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sltrain_dist.config.schema import Config
from sltrain_dist.data.prepare.make_corpus import EMBEDDED, build_embedded
from sltrain_dist.data.sources.resolve import resolve_source
from sltrain_dist.data.sources.retry import Fetcher, RetryPolicy
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.errors import ConfigError


def check_data(config: Config, say: Callable[[str], None]) -> None:
    """Finds the training and evaluation data and the tokenizer, which are the same for all trials of a study.

    The embedded corpus is built if it is used and does not exist, so that trials that start together do not all
    build it.

    Raises:
        ConfigError: The model's vocabulary is too small for the tokenizer.
        DataError: A source or the tokenizer does not exist or cannot be read.
    """
    data, evaluation = config.data, config.eval
    if EMBEDDED in (data.source, evaluation.source, data.tokenizer):
        vocab_size = config.model.vocab_size if data.tokenizer == EMBEDDED else None
        build_embedded(None if data.cache_dir is None else Path(data.cache_dir), vocab_size, report=say)
    if data.tokenizer != EMBEDDED:
        found = Tokenizer(Path(data.tokenizer)).vocab_size
        if found > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {config.model.vocab_size} is smaller than the {found} pieces of {data.tokenizer}; "
                f"set model.vocab_size={found} or more"
            )
    fetcher = Fetcher(RetryPolicy.of(data), report=say)
    sources = (
        ("data.source", data.source, data.subset, data.split),
        ("eval.source", evaluation.source, evaluation.subset, evaluation.split),
    )
    for key, source, subset, split in sources:
        if source is not None and source != EMBEDDED:
            resolve_source(source, subset=subset, split=split, key=key, fetcher=fetcher, report=say)
