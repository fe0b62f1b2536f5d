"""memory/device_overhead.py: what a device takes beside allocated tensors."""

from __future__ import annotations

import pytest

from sltrain_dist.config.schema import ParallelConfig
from sltrain_dist.memory.device_overhead import (
    CONTEXT_BYTES,
    MIB,
    NCCL_BYTES,
    communicators,
    outside_bytes,
    reserved_bytes,
)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"engine": "ddp"}, 1),
        ({"engine": "fsdp"}, 1),
        ({"engine": "fsdp", "replicas": 2}, 3),
        ({"engine": "zero", "zero_stage": 1}, 2),
        ({"engine": "zero", "zero_stage": 3}, 2),
    ],
)
def test_communicators_of_each_engine(parallel: dict[str, object], expected: int) -> None:
    assert communicators(ParallelConfig.model_validate(parallel)) == expected


def test_one_rank_needs_no_communicator() -> None:
    assert outside_bytes(1, 3) == CONTEXT_BYTES
    assert outside_bytes(8) == CONTEXT_BYTES + NCCL_BYTES
    assert outside_bytes(8, 3) - outside_bytes(8) == 2 * NCCL_BYTES


def test_reserved_bytes_grow_with_peak_tensors_and_communicators() -> None:
    least = reserved_bytes(0, 0, 1)
    assert least == CONTEXT_BYTES + (64 + 20 + 2) * MIB
    assert reserved_bytes(100 * MIB, 0, 1) - least == 7 * MIB
    assert reserved_bytes(0, 10, 1) - least == 10 * 256
    assert reserved_bytes(0, 0, 4, 2) - least == 2 * NCCL_BYTES
