"""What the planner takes for granted of a device (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        type: As in `torch.device`; it decides which path a layer takes.
        kernels: Whether Triton's kernels are used (sparse_lowrank/kernels.py).
        fused: Whether RMSNorm is one kernel forward and one backward, and attention's scratch memory torch's own.
        span: Values that the optimizers of :mod:`sltrain_dist.optim.low_bit` update at a time.
    """

    type: Literal["cuda", "cpu"] = "cuda"
    kernels: bool = True
    fused: bool = True
    span: int = 1 << 21


CUDA = Device()
"""What plans are made for. Triton comes with torch's CUDA builds."""

CONTEXT_BYTES = 770 * MIB
"""CUDA context with the kernels that a run loads, which is outside of the allocator: 0.80 GB on an H200 with CUDA 13
(docs/reports/2026-11-27-h200.md), the same for models of 1B and 7B."""

NCCL_BYTES = 256 * MIB
"""With several ranks, what NCCL takes for its channels' buffers: NCCL_BUFFSIZE (4 MiB) for each of up to 32 channels,
in both directions."""

WORKSPACE_BYTES = 2 * 32 * MIB
"""cuBLAS' workspaces, one for each handle and stream: 32 MiB on Hopper, 8.125 MiB before (torch's defaults for
CUBLAS_WORKSPACE_CONFIG, CublasHandlePool.cpp: parseChosenWorkspaceSize), for the thread that goes forward and for
autograd's. The allocator counts them: 67 MB on an H200 before the first tensor."""

BLOCK_BYTES = 512
"""The caching allocator rounds every size up to a multiple of this (CUDACachingAllocator: kMinBlockSize)."""

SEGMENT_BYTES = 20 * MIB
"""It asks the driver for this much at a time where a tensor has 1 to 10 MiB (kLargeBuffer), and for 2 MiB where it has
less (kSmallBuffer): at most one of each is nearly empty."""

SLACK = 0.07
"""Share of the allocated bytes that lies idle at the peak, in blocks and segments of other sizes than are asked for: 3
to 7 % in eager runs of 1B and 7B on an H200. A margin, not a property of the model;
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True makes it smaller."""


def reserved_bytes(peak_bytes: int, tensors: int, ranks: int) -> int:
    """What a device takes beside the bytes of `tensors` live tensors at the peak."""
    fixed = CONTEXT_BYTES + WORKSPACE_BYTES + SEGMENT_BYTES + 2 * MIB + (NCCL_BYTES if ranks > 1 else 0)
    return fixed + tensors * BLOCK_BYTES // 2 + int(SLACK * peak_bytes)
