"""Text and tokenizer of the whole runs, made once, and a process that survives running them."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sltrain_dist.data.tokenizer import train_tokenizer
from tests.support.runs import Corpus, documents, tiny_config, train_here, write_config, write_shard

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus")
    for shard in range(3):
        write_shard(directory / f"c4-train.{shard:05d}-of-00003.json.gz", documents(f"train-{shard}", 60))
    write_shard(directory / "c4-validation.00000-of-00001.json.gz", documents("validation", 21))
    tokenizer = directory / "tokenizer.model"
    train_tokenizer(documents("tokenizer", 200), tokenizer, vocab_size=300)
    return Corpus(str(directory / "c4-train.*.json.gz"), str(directory / "c4-validation.*.json.gz"), tokenizer)


@pytest.fixture(scope="session")
def tiny(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of 6 updates, with a checkpoint every 2 and an evaluation every 3."""
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_config(corpus))


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tiny` that has ended, to be copied."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    with _no_traces():
        assert train_here(tiny, run_dir) == 0
    return run_dir


@pytest.fixture(autouse=True)
def _leaves_no_traces() -> Iterator[None]:
    with _no_traces():
        yield


@contextmanager
def _no_traces() -> Iterator[None]:
    """Restores what a run in this process changes: signal handlers and random states."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    of_torch, of_python = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
