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

CONTEXT_BYTES = 500 * MIB
"""CUDA context with torch's and NCCL's kernels loaded. CUDA's lazy loading (the default since 12.2) leaves 300 to 500 MiB
on A100 and H100 after the first matrix products, which nvidia-smi shows beyond the allocator's own; the upper end."""

WORKSPACE_BYTES = 32 * MIB
"""cuBLAS: one workspace for each handle and stream. torch allocates it through its allocator: 32 MiB on Hopper, 8.125 MiB
before (aten/src/ATen/cuda/CUDABlas / CublasHandlePool: `getChosenWorkspaceSize`)."""

ROUNDING_BYTES = 512
"""The caching allocator's smallest unit (c10/cuda/CUDACachingAllocator: kMinBlockSize)."""

SEGMENT_BYTES = 20 * MIB
"""What it asks the driver for at a time where a tensor has 1 to 10 MiB (kLargeBuffer); larger ones get their own
segments, rounded up to 2 MiB (kRoundLarge)."""

SLACK = 0.03
"""Share of the allocated bytes that lies idle in such segments at the peak: fragmentation. Not a property of the model; a
margin, which `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` makes smaller."""


def reserved_bytes(peak_bytes: int, tensors: int) -> int:
    """What a device takes beside the bytes of `tensors` live tensors at the peak."""
    return CONTEXT_BYTES + WORKSPACE_BYTES + SEGMENT_BYTES + ROUNDING_BYTES * tensors // 2 + int(SLACK * peak_bytes)
