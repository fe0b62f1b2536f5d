"""The training loader: this rank's rows of every update, prepared in the background, with exact resume."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sltrain_dist.config.schema import DataConfig
from sltrain_dist.data import order
from sltrain_dist.data.cursor import data_order, make_cursor, merge_states, read_cursor
from sltrain_dist.data.documents import Fault, TokenIds
from sltrain_dist.data.sources.identity import identify
from sltrain_dist.data.sources.retry import Cause, RetryPolicy
from sltrain_dist.data.sources.token_shards import manifest_for
from sltrain_dist.data.stream.stream_group import StreamGroup, UpdateRows
from sltrain_dist.data.stream.virtual_stream import StreamSettings, StreamState, WeightedSource
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.data.worker import Job, Worker
from sltrain_dist.errors import ConfigError, DataError

_WEIGHT_TOLERANCE = 0.05
"""Largest accepted deviation of a source's share of the rows from its weight, relative to the weight."""

__all__ = ["LoaderStats", "TrainLoader", "merge_states"]


@dataclass
class LoaderStats:
    """Totals since the loader was created. A stream shared by two ranks counts on both."""

    wait_s: float = 0.0
    """Seconds that the caller waited for rows."""
    documents: int = 0
    """Documents read, unusable ones included."""
    bad: dict[str, int] = field(default_factory=lambda: {fault.value: 0 for fault in Fault})
    """Documents that could not be used, by cause."""
    retries: dict[str, int] = field(default_factory=lambda: {cause.value: 0 for cause in Cause})
    """Retries of reading a remote shard, by cause."""


class TrainLoader:
    """Endless iterator over this rank's rows of each update.

    The rows of all ranks, concatenated in rank order, are the same for any number of ranks and workers.

    Args:
        data: The data section of the configuration. Its `source` and `tokenizer` are ignored.
        shards: The files that `data.source` resolves to, see :func:`sltrain_dist.data.sources.resolve.resolve_source`.
        tokenizer_path: The SentencePiece model file.
        seed: Seed of the order of documents.
        global_batch: Rows of an update, over all ranks.
        rank: In 0 … world_size − 1.
        world_size: Number of ranks; divides `global_batch`.
        source_sizes: With `data.weights`: number of shards of each source, in order.
        state: Position to resume from, as :func:`merge_states` returned it for any number of ranks. None: the start.
        timeout_s: Seconds to wait for a worker before it counts as stuck.

    Attributes:
        order: Everything that determines the order of the tokens, such as hashes of the shard list and of the
            tokenizer; must be equal on all ranks.

    Raises:
        ConfigError: Token shards were prepared with other settings, or `data.streams` cannot realize `data.weights`.
        DataError: The tokenizer cannot be read, or there are no shards.
        CheckpointError: `state` belongs to other data or another order.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        shards: Sequence[str],
        tokenizer_path: Path,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        source_sizes: Sequence[int] = (),
        state: dict[str, Any] | None = None,
        timeout_s: float = math.inf,
    ) -> None:
        if not shards:
            raise DataError("the training data has no shards; check data.source")
        self.stats = LoaderStats()
        tokenizer = Tokenizer(tokenizer_path)
        prepared = manifest_for(shards, tokenizer, data.text_field, data.max_document_bytes)
        files = shards if prepared is None else prepared.all_files()
        settings = StreamSettings(
            shards=tuple(shards) if prepared is None else tuple(name for name, _ in prepared.job.sources),
            text_field=data.text_field,
            seed=seed,
            streams=order.num_streams(data.streams, global_batch),
            batching=data.batching,
            seq_len=data.seq_len,
            shuffle_block=data.shuffle_block,
            max_bad_fraction=data.max_bad_fraction,
            prepared=prepared,
            retry=RetryPolicy.of(data),
            mixture=() if prepared is not None else _mixture(data, source_sizes, len(shards), global_batch),
            mark=data.reset_attention,
            max_document_bytes=data.max_document_bytes,
            files=identify(files),
            truncate=data.truncate,
        )
        shares = order.rank_shares(rank, world_size, global_batch, settings.streams)
        self.order = data_order(settings, tokenizer.fingerprint)
        self._updates = 0
        self._states = {share.stream: StreamState() for share in shares}
        if state is not None:
            self._updates, self._states = read_cursor(state, self.order, list(self._states), settings)
        self._failure: Exception | None = None
        self._workers: list[Worker] = []
        self._groups: list[StreamGroup] | list[Worker]
        if data.workers == 0:
            self._groups = [StreamGroup(settings, tokenizer, shares, self._states)]
            return
        for part in _contiguous_parts(shares, data.workers):
            states = {share.stream: self._states[share.stream] for share in part}
            self._workers.append(Worker(Job(settings, tokenizer_path, part, states, data.prefetch), timeout_s))
        self._groups = self._workers

    def __iter__(self) -> TrainLoader:
        return self

    def wait(self, should_stop: Callable[[], object]) -> bool:
        """Waits until the workers have the next update ready.

        Args:
            should_stop: Called a few times a second; a true result ends the waiting.

        Returns:
            Whether the next call of :meth:`__next__` returns, or raises its error, without waiting.
        """
        if self._failure is None:
            try:
                return all(worker.wait(should_stop) for worker in self._workers)
            except DataError as error:
                self._failure = error
        return True

    def __next__(self) -> TokenIds:
        """Returns this rank's rows of the next update, shape (global_batch / world_size, seq_len + 1), int32.

        −1 is padding. With `data.reset_attention`, documents' first tokens are marked, see `rows.split_marks`. After an
        error, every later call raises it again.

        Raises:
            DataError: A shard cannot be read, too many documents are unusable, or a worker died or is stuck.
        """
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        try:
            updates = [group.next_update() for group in self._groups]
        except Exception as error:
            self._failure = error
            raise
        self._updates += 1
        self._states = {stream: state for update in updates for stream, state in update.states.items()}
        self._count(updates, time.perf_counter() - start)
        return np.concatenate([update.rows for update in updates])

    def state_dict(self) -> dict[str, Any]:
        """Returns the cursor after the last returned rows, for JSON: the positions of this rank's streams.

        :func:`merge_states` joins the cursors of all ranks.
        """
        return make_cursor(self.order, self._updates, self._states)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """Ends the workers. May be called twice."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.join()
        self._failure = self._failure or RuntimeError("the loader is closed")

    def _count(self, updates: Sequence[UpdateRows], wait_s: float) -> None:
        faults = sum((update.faults_found for update in updates), Counter[Fault]())
        self.stats.wait_s += wait_s
        self.stats.documents = sum(update.documents_read for update in updates)
        self.stats.bad = {fault.value: faults[fault] for fault in Fault}
        retries = sum((update.retries for update in updates), Counter[Cause]())
        self.stats.retries = {cause.value: retries[cause] for cause in Cause}


def _mixture(data: DataConfig, sizes: Sequence[int], num_shards: int, global_batch: int) -> tuple[WeightedSource, ...]:
    """Returns the weighted sources. Raises ConfigError if whole streams cannot realize the weights."""
    if data.weights is None:
        return ()
    if len(sizes) != len(data.weights) or sum(sizes) != num_shards:
        raise ValueError(f"{len(data.weights)} weights for sources of {list(sizes)} shards, {num_shards} in all")
    stream_sources = order.deal_streams(data.weights, order.num_streams(data.streams, global_batch))
    shares = order.source_shares(stream_sources, len(sizes), global_batch)
    wanted = [weight / sum(data.weights) for weight in data.weights]
    if any(abs(share - due) > _WEIGHT_TOLERANCE * due for share, due in zip(shares, wanted, strict=True)):
        raise ConfigError(
            f"data.weights are shares of {[round(due, 4) for due in wanted]}, but {len(stream_sources)} streams give "
            f"{[round(share, 4) for share in shares]} of the {global_batch} rows of an update: every stream reads one "
            "source. Set data.streams (at most train.global_batch, best a divisor of it) so that each weight is a "
            f"whole number of streams, within {_WEIGHT_TOLERANCE:.0%}"
        )
    return tuple(map(WeightedSource, sizes, data.weights))


def _contiguous_parts(shares: list[order.StreamShare], workers: int) -> list[list[order.StreamShare]]:
    """Splits the streams into one contiguous part per worker, so that the rows stay in order."""
    count = min(workers, len(shares))
    bounds = [len(shares) * index // count for index in range(count + 1)]
    return [shares[begin:end] for begin, end in pairwise(bounds)]
