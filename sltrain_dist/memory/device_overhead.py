"""Device memory beyond tensors (no torch): CUDA context, communicators, workspaces, unused allocator memory."""

from __future__ import annotations

from sltrain_dist.config.schema import ParallelConfig

MIB = 1 << 20


CONTEXT_BYTES = 770 * MIB
"""The CUDA context with the kernels that a run loads, outside the caching allocator: 0.80 GB on an H200 with CUDA 13
(docs/reports/2026-11-27-h200.md), the same for models of 1B and 7B. A context without kernels takes 0.3 to 0.45 GB,
because since CUDA 11.7 kernels are loaded at their first use (pytorch/pytorch issues 107667, 109888)."""

NCCL_BYTES = 688 * MIB
"""Device memory of one NCCL communicator, outside the caching allocator. Measured on four A100s with NVLink after one
all-reduce: 544 MiB for two ranks, 688 MiB for more (NVIDIA/nccl issue 964). Every communicator has its own
buffers, which do not grow beyond two hosts (NVIDIA/nccl issue 864). Others report 0.65 GiB on AMD GPUs
(Lumi-supercomputer/LUMI-AI-Guide issue 111) and 388 MiB on one RTX 3060 (sgl-project/sglang pull request 35538).

NCCL's source gives the same size. One channel's connection to a neighbour takes the three protocols' buffers (0.5,
4.7 and NCCL_BUFFSIZE = 4 MiB; src/init.cc: computeBuffSizes) in an allocation of 10 MiB, and 2 MiB for its flags
(src/transport/p2p.cc; sizes as in NVIDIA/nccl issue 1685). With 24 channels, rings and trees take 24 x 2 x 12 MiB = 576
MiB. NVLink SHARP on eight Hopper GPUs takes 8 x 16 x 2 x 1 MiB = 256 MiB instead of the trees' 288
(src/transport/nvls.cc: ncclNvlsBufferSetup). A lower NCCL_MAX_NCHANNELS saves memory and costs bandwidth."""

WORKSPACE_BYTES = 2 * 32 * MIB
"""cuBLAS workspaces, one for each handle and stream: 32 MiB on Hopper, 8.125 MiB on older GPUs (torch's defaults for
CUBLAS_WORKSPACE_CONFIG, CublasHandlePool.cpp: parseChosenWorkspaceSize). The forward pass and autograd run in different
threads, so there are two. The allocator counts them: 67 MB on an H200 before the first tensor."""

BLOCK_BYTES = 512
"""Unit to whose multiples the caching allocator rounds every size up (CUDACachingAllocator: kMinBlockSize)."""

SEGMENT_BYTES = 20 * MIB
"""Memory that the allocator requests from the driver at a time for tensors of 1 to 10 MiB (kLargeBuffer). For smaller
ones it requests 2 MiB (kSmallBuffer). At most one segment of each kind is nearly empty."""

SLACK = 0.07
"""Memory that fragmentation leaves unused at the peak, as a share of the allocated bytes: 3 to 7 % in eager runs of 1B
and 7B on an H200. It is a margin, not a property of the model: others report from less than 1 % (torchtune's tutorials:
6.21 GiB allocated, 6.27 GiB reserved) up to a third, where something is wrong (pytorch/pytorch issue 147179: 60 GB
active, 82 GB reserved). PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True makes it smaller."""


def communicators(parallel: ParallelConfig) -> int:
    """Returns the number of NCCL communicators of a rank; a group's first collective creates its communicator.

    All engines use the default group. torch's DeviceMesh reuses it if one dimension spans all ranks (device_mesh.py:
    _init_one_process_group). A mesh of two dimensions, as with `parallel.replicas`, creates a group for each.
    DeepSpeed clones the default group (deepspeed/utils/groups.py: _clone_world_group).
    """
    if parallel.engine == "zero":
        return 2
    return 3 if parallel.replicas > 1 else 1


def outside_bytes(ranks: int, communicators: int = 1) -> int:
    """Returns the device memory outside the caching allocator: the CUDA context and NCCL's communicators."""
    return CONTEXT_BYTES + (communicators * NCCL_BYTES if ranks > 1 else 0)


def reserved_bytes(peak_bytes: int, tensors: int, ranks: int, communicators: int = 1) -> int:
    """Returns the device memory that a run takes beyond the bytes of its tensors.

    Args:
        peak_bytes: Allocated bytes at the peak.
        tensors: Number of live tensors at the peak.
        ranks: World size.
        communicators: Number from :func:`communicators`; has no effect with one rank.
    """
    fixed = outside_bytes(ranks, communicators) + WORKSPACE_BYTES + SEGMENT_BYTES + 2 * MIB
    return fixed + tensors * BLOCK_BYTES // 2 + int(SLACK * peak_bytes)
