"""runtime/malloc.py: large blocks that are freed are used again, without new pages from the system."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource
import torch
from sltrain_dist.runtime.malloc import keep_freed_memory

if {keep}:
    assert keep_freed_memory()
for _ in range(10):  # until it has found places for all
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(12_000_000) for _ in range(3)]  # of 48 MB, more than glibc would keep
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*, keep: bool) -> int:
    """Of the tenth time that three tensors of 48 MB are made and freed."""
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def huge_pages() -> bool:
    """Whether every large block gets them: few pages then hide what is measured."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[always]" in setting.read_text()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.skipif(huge_pages(), reason="huge pages")
def test_freed_memory_is_used_again() -> None:
    assert page_faults(keep=False) > 10_000  # 144 MB are 35 thousand pages
    assert page_faults(keep=True) < 1000
