"""The C library's heap, on the CPU: memory that is freed is kept for the next update."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), as in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Has glibc keep freed memory of any size, where by default it returns large blocks to the system.

    Every update allocates the same sizes again, and pages that come from the system anew are cleared and mapped one by
    one: a twentieth of an update's time (docs/operator.md). In exchange the process holds what it used at most, and the
    cuttings between blocks that fit no other.

    Returns:
        Whether the C library knows these settings; on Linux with another than glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))
