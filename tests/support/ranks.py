"""Several ranks as threads of one process: what `Environment` does over a process group, over a list."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from sltrain_dist.runtime.environment import Environment

T = TypeVar("T")
SINGLE = Environment(0, 1, 0, torch.device("cpu"))


@dataclass
class _Meeting:
    ranks: int
    values: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.values = [None] * self.ranks
        self.barrier = threading.Barrier(self.ranks, timeout=30)


@dataclass(frozen=True)
class ThreadRank(Environment):
    """One of several ranks."""

    meeting: _Meeting

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = pickle.dumps(value)
        self.meeting.barrier.wait()
        values = [pickle.loads(each) for each in self.meeting.values]
        self.meeting.barrier.wait()
        return values

    def sum(self, values: list[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def max(self, values: list[float]) -> list[float]:
        return [max(column) for column in zip(*self.gather(values), strict=True)]

    def on_main(self, action: Callable[[], T]) -> T:
        result: Any = self.together(lambda: action() if self.is_main else None)[0]
        return result


def on_ranks(ranks: int, action: Callable[[Environment], T]) -> list[T]:
    """Runs `action` on every rank at once; returns the results by rank, or raises the first rank's error."""
    meeting = _Meeting(ranks)

    def run(rank: int) -> T:
        try:
            return action(ThreadRank(rank, ranks, rank, torch.device("cpu"), meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:  # the others' only say that one is missing
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
