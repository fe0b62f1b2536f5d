"""Rows one update ahead: the same rows, the cursor of those that were taken, errors when their update comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sltrain_dist.data import loader as loader_module
from sltrain_dist.errors import DataError
from sltrain_dist.train.device_rows import RowPrefetcher
from sltrain_dist.train.step import Rows
from tests.support.data import NumberTokenizer, data_config, make_loaders, write_numbered

CPU = torch.device("cpu")


class Numbers:
    """Rows of the update's number, up to a last one."""

    def __init__(self, last: int = 100) -> None:
        self.taken, self.last, self.slow = 0, last, False

    def wait(self, asked: Callable[[], object]) -> bool:
        return not (self.slow and asked())

    def __next__(self) -> Rows:
        if self.taken == self.last:
            raise DataError("no more")
        self.taken += 1
        return np.full((2, 3), self.taken, dtype=np.int32)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}


def number(feed: RowPrefetcher) -> int:
    rows, sent = feed.take()
    assert np.array_equal(rows, sent.numpy())
    assert sent.dtype == torch.int32
    return int(rows[0, 0])


def test_the_cursor_is_that_of_the_rows_taken() -> None:
    loader = Numbers()
    feed = RowPrefetcher(loader, CPU, ahead=True)
    assert (number(feed), feed.state_dict()) == (1, {"taken": 1})
    for update in range(2, 6):
        feed.prepare()
        feed.prepare()  # once is enough
        assert loader.taken == update
        assert feed.state_dict() == {"taken": update - 1}
        assert (number(feed), feed.state_dict()) == (update, {"taken": update})


def test_an_error_waits_for_its_update() -> None:
    feed = RowPrefetcher(Numbers(last=1), CPU, ahead=True)
    assert number(feed) == 1
    feed.prepare()
    assert feed.state_dict() == {"taken": 1}
    with pytest.raises(DataError, match="no more"):
        feed.take()
    with pytest.raises(DataError, match="no more"):
        feed.take()


def test_rows_that_do_not_come_are_not_waited_for_when_asked_to_stop() -> None:
    loader = Numbers()
    feed = RowPrefetcher(loader, CPU, ahead=True)
    assert number(feed) == 1
    loader.slow = True
    feed.prepare(lambda: "SIGTERM")
    feed.wait(lambda: "SIGTERM")
    assert (loader.taken, feed.state_dict()) == (1, {"taken": 1}), "nothing was taken, and none will be missing"
    feed.prepare()
    loader.slow = False
    assert (number(feed), feed.state_dict()) == (2, {"taken": 2})


def test_nothing_is_ahead_on_the_cpu() -> None:
    loader = Numbers()
    feed = RowPrefetcher(loader, CPU)
    feed.take()
    feed.prepare()
    assert loader.taken == 1


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_that_was_ahead_resumes_exactly(tmp_path, monkeypatch, stop: int) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(loader_module, "Tokenizer", NumberTokenizer)
    shards = write_numbered(tmp_path, [40, 50], lambda i: i % 13 + 1)
    config = data_config(batching="pack", reset_attention=True)

    def feed(state: dict[str, Any] | None = None) -> RowPrefetcher:
        (loader,) = make_loaders(config, shards, 1, state=state)
        return RowPrefetcher(loader, CPU, ahead=True)

    def updates(source: RowPrefetcher, count: int) -> list[Rows]:
        taken = []
        for _ in range(count):
            taken.append(source.take().rows)
            source.prepare()
        return taken

    whole, first = updates(feed(), 8), feed()
    before = updates(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    assert all(map(np.array_equal, [*before, *updates(feed(state), 8 - stop)], whole))


def test_on_cuda_a_copy_is_begun_from_pinned_memory_and_waited_for_when_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of CUDA and in which order; tests/gpu has what comes of it."""
    done: list[str] = []

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            self.name = "compute" if device is None else "copy"

        def __enter__(self) -> None:
            done.append(f"enter {self.name}")

        def __exit__(self, *exception: object) -> None:
            done.append(f"leave {self.name}")

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} waits for {other.name}")

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        done.append("pin")
        return tensor.clone()  # as pinning does: the loader may do with its own what it likes

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        done.append(f"to {device}, {non_blocking=}")
        return tensor

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: done.append(f"held for {stream.name}"))
    feed = RowPrefetcher(Numbers(), torch.device("cuda", 0))
    begun = ["pin", "enter copy", "to cuda:0, non_blocking=True", "leave copy"]
    taken = ["compute waits for copy", "held for compute"]
    assert number(feed) == 1
    assert done == begun + taken
    done.clear()
    feed.prepare()
    assert done == begun
    done.clear()
    assert number(feed) == 2
    assert done == taken
