"""The launchers above this process: torchrun, or `deepspeed` and the launcher that it starts on every host.

A launcher that is killed leaves its ranks behind, and they would train on with nobody to look after them. SIGTERM does
that to `deepspeed`, which passes it on to nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sltrain_dist.parallel.reaper import Process


def launchers_of(process: Process | None) -> Iterator[Process]:
    """The launchers among the ancestors of a process, the nearest first."""
    while process is not None:
        process = process.parent()
        if process is not None and process.is_launcher:
            yield process


def lost_launcher(launchers: tuple[Process, ...] | None = None) -> str | None:
    """A sentence about a launcher that is gone; None if all are there.

    Args:
        launchers: The nearest first. None: those that were there when this process began.
    """
    for launcher in _AT_START if launchers is None else launchers:
        if not launcher.runs:
            return f"the launcher of this process is gone ({launcher.name}, process {launcher.pid})"
        if launcher.is_started_by_deepspeed and launcher.is_adopted:
            return f"the deepspeed command that has started process {launcher.pid} is gone"
    return None


_AT_START = tuple(launchers_of(Process.of(os.getpid())))
"""Found when this module is imported, which is before torch is: one that is lost meanwhile is missed as well."""
