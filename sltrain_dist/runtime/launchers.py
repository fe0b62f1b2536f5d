"""The launchers among this process's ancestors: torchrun, or `deepspeed` and the launcher that it starts on each host.

The ranks of a killed launcher would keep training without supervision. This also happens when `deepspeed` receives
SIGTERM, which it does not forward.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sltrain_dist.runtime.reaper import Process


def launchers_of(process: Process | None) -> Iterator[Process]:
    """Yields the launchers among the ancestors of a process, nearest first."""
    while process is not None:
        process = process.parent()
        if process is not None and process.is_launcher:
            yield process


def lost_launcher() -> str | None:
    """Says which launcher of this process has ended; None if all are running."""
    if _ORPHAN is not None:
        return f"the deepspeed command that started process {_ORPHAN.pid} is gone"
    for launcher in _AT_START:
        if not launcher.runs:
            return f"the launcher of this process is gone ({launcher.name}, process {launcher.pid})"
    return None


_AT_START = tuple(launchers_of(Process.of(os.getpid())))
"""The launchers when this module is imported, before torch, so that one that ends during that import is noticed."""
_ORPHAN = next((each for each in _AT_START[-1:] if each.is_started_by_deepspeed and each.is_adopted), None)
"""DeepSpeed's launcher on this host, if the `deepspeed` command ended even before that; else None."""
