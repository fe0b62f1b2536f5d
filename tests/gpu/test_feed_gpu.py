"""Rows that are sent ahead arrive whole, whatever the device is busy with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sltrain_dist.train.device_rows import RowPrefetcher
from sltrain_dist.train.step import Rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda", 0)
SHAPE = (512, 1025)
UPDATES = 50
_BUSY_CYCLES = 2_000_000
"""About a millisecond, in which the host gets far ahead of the device."""


def rows_of(update: int) -> Rows:
    return np.random.default_rng(update).integers(0, 32_000, SHAPE).astype(np.int32)


class Updates:
    """The rows of each update; what was returned is overwritten, as a loader may do."""

    def __init__(self) -> None:
        self.taken = 0
        self._last = np.empty(0, dtype=np.int32)

    def __next__(self) -> Rows:
        self._last.fill(-7)
        self._last = rows_of(self.taken)
        self.taken += 1
        return self._last

    def wait(self, asked: Callable[[], object]) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}


def test_no_copy_is_overtaken() -> None:
    """Sums on a busy device, read at the very end: pinned and device memory are used again many times before."""
    feed, sums = RowPrefetcher(Updates(), CUDA), []
    for _ in range(UPDATES):
        _, sent = feed.take()
        torch.cuda._sleep(_BUSY_CYCLES)
        sums.append(sent.sum(dtype=torch.int64) + sent[3, 5].long() * 1_000_000)
        del sent
        feed.prepare()
    expected = [int(rows.sum(dtype=np.int64)) + int(rows[3, 5]) * 1_000_000 for rows in map(rows_of, range(UPDATES))]
    assert [int(each) for each in sums] == expected
    assert feed.state_dict() == {"taken": UPDATES}


def test_the_host_does_not_wait_for_the_device() -> None:
    """Preparing is over while the device still computes: the copy is from pinned memory, on a stream of its own."""
    feed = RowPrefetcher(Updates(), CUDA)
    feed.take()
    feed.prepare()  # allocates
    feed.take()
    torch.cuda.synchronize()
    computed = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    computed.record()
    feed.prepare()
    assert feed._stream is not None
    feed._stream.synchronize()
    assert not computed.query(), "the copy waited for the computation"
    computed.synchronize()
    assert torch.equal(feed.take().sent.cpu(), torch.from_numpy(rows_of(2)))
