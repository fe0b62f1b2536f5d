"""Device memory beside the bytes of tensors (no torch): context, communicators, workspaces, the allocator's rest."""

from __future__ import annotations

from sltrain_dist.config.schema import ParallelConfig

MIB = 1 << 20


CONTEXT_BYTES = 770 * MIB
"""CUDA context with the kernels that a run loads, which is outside of the allocator: 0.80 GB on an H200 with CUDA 13
(docs/reports/2026-11-27-h200.md), the same for models of 1B and 7B. A context without kernels has 0.3 to 0.45 GB since
CUDA 11.7 loads kernels when they are first used (pytorch/pytorch issues 107667, 109888)."""

NCCL_BYTES = 688 * MIB
"""Device memory of one NCCL communicator, outside of the allocator. Measured on four A100s with NVLink after one
all-reduce: 544 MiB for two ranks, 688 MiB for more (NVIDIA/nccl issue 964). Every communicator has its own
buffers, which do not grow beyond two hosts (NVIDIA/nccl issue 864). Others report 0.65 GiB on AMD GPUs
(Lumi-supercomputer/LUMI-AI-Guide issue 111) and 388 MiB on one RTX 3060 (sgl-project/sglang pull request 35538).

NCCL's source gives the same size. A connection of one channel to a neighbour takes the three protocols' buffers (0.5,
4.7 and NCCL_BUFFSIZE = 4 MiB; src/init.cc: computeBuffSizes) in a block of 10 MiB, and a block of 2 MiB for its flags
(src/transport/p2p.cc; sizes as in NVIDIA/nccl issue 1685). With 24 channels, rings and trees take 24 x 2 x 12 MiB = 576
MiB. NVLink SHARP on eight Hopper GPUs takes 8 x 16 x 2 x 1 MiB = 256 MiB in place of the trees' 288
(src/transport/nvls.cc: ncclNvlsBufferSetup). NCCL_MAX_NCHANNELS makes it smaller, for less bandwidth."""

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
to 7 % in eager runs of 1B and 7B on an H200. A margin, not a property of the model: runs that others report have less
than 1 % (torchtune's tutorials: 6.21 GiB allocated, 6.27 GiB reserved) up to a third, where something is wrong
(pytorch/pytorch issue 147179: 60 GB active, 82 GB reserved).
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True makes it smaller."""


def communicators(parallel: ParallelConfig) -> int:
    """Number of NCCL communicators that a rank of several uses; each is made by the first collective of its group.

    All engines use the default group. torch's DeviceMesh takes it too where one dimension spans all ranks
    (device_mesh.py: _init_one_process_group), and makes a group for each dimension of two, as with
    `parallel.replicas`. DeepSpeed clones the default group (deepspeed/utils/groups.py: _clone_world_group).
    """
    if parallel.engine == "zero":
        return 2
    return 3 if parallel.replicas > 1 else 1


def outside_bytes(ranks: int, communicators: int = 1) -> int:
    """Device memory that the caching allocator does not count: the CUDA context and NCCL's communicators."""
    return CONTEXT_BYTES + (communicators * NCCL_BYTES if ranks > 1 else 0)


def reserved_bytes(peak_bytes: int, tensors: int, ranks: int, communicators: int = 1) -> int:
    """Device memory beside the bytes of `tensors` live tensors at the peak.

    Args:
        peak_bytes: Allocated bytes at the peak.
        tensors: Number of live tensors at the peak.
        ranks: World size.
        communicators: As counted by :func:`communicators`; without effect with one rank.
    """
    fixed = outside_bytes(ranks, communicators) + WORKSPACE_BYTES + SEGMENT_BYTES + 2 * MIB
    return fixed + tensors * BLOCK_BYTES // 2 + int(SLACK * peak_bytes)
