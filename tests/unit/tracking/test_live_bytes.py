"""tracking/live_bytes.py: storages come and go, and change their size."""

from __future__ import annotations

import pytest
import torch

from sltrain_dist.tracking.live_bytes import LiveBytes


def test_storages_come_and_go() -> None:
    kept = torch.zeros(1000)
    with LiveBytes() as tracker:
        tracker.add([kept])
        tracker.add([kept[3:], kept.view(10, 100)])
        first = torch.ones(500) + 1  # two of 2 kB for a moment
        view = first[10:]
        del first
        assert tracker.live == 4000 + 2000  # the view keeps its storage
        del view
        assert tracker.live == 4000
    assert tracker.peak == 4000 + 4000
    after = torch.zeros(10_000)
    assert after.numel() and tracker.peak == 8000  # not followed any more


def test_a_storage_has_its_size_of_the_moment() -> None:
    """FSDP2 frees and allocates gathered weights by resizing their storages."""
    with LiveBytes() as tracker:
        gathered = torch.zeros(256)
        gathered.untyped_storage().resize_(0)
        assert tracker.live == 0
        torch.zeros(64)
        gathered.untyped_storage().resize_(2048)
        assert tracker.live == tracker.peak == 2048


def test_every_interval_has_its_own_peak() -> None:
    with LiveBytes() as tracker:
        tracker.begin("first")
        kept = torch.zeros(100)
        torch.zeros(100)
        tracker.begin("second")
        torch.zeros(10)
    assert [(each.name, each.peak) for each in tracker.intervals[1:]] == [("first", 800), ("second", 440)]
    assert kept.numel() == 100


def test_bytes_inside_of_an_operator() -> None:
    with LiveBytes({torch.ops.aten.mm.default: lambda left, right: left.nbytes}) as tracker:
        torch.zeros(4, 4) @ torch.zeros(4, 4)
    assert (tracker.live, tracker.peak) == (0, 4 * 64)


@pytest.mark.parametrize("fails", [False, True])
def test_storages_resize_as_before_when_it_is_left(fails: bool) -> None:
    before = torch.UntypedStorage.resize_
    try:
        with LiveBytes():
            assert torch.UntypedStorage.resize_ is not before
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert torch.UntypedStorage.resize_ is before
