"""Tuning of glibc's malloc for training on the CPU: freed memory is kept for the next update."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), as in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory of any size instead of returning large blocks to the system.

    Every update allocates the same sizes again, and the system clears and maps each new page: a twentieth of an
    update's time (docs/operator.md). In exchange the process keeps its peak memory, plus fragmentation.

    Returns:
        Whether the C library supports these settings. With C libraries other than glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))
