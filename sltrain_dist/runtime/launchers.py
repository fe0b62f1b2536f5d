"""The launchers above this process: torchrun, or `deepspeed` and the launcher that it starts on every host.

A launcher that is killed leaves its ranks behind, and they would train on with nobody to look after them. SIGTERM does
that to `deepspeed`, which passes it on to nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sltrain_dist.runtime.reaper import Process


def launchers_of(process: Process | None) -> Iterator[Process]:
    """The launchers among the ancestors of a process, the nearest first."""
    while process is not None:
        process = process.parent()
        if process is not None and process.is_launcher:
            yield process


def lost_launcher() -> str | None:
    """A sentence about a launcher above this process that is gone; None if all are there."""
    if _ORPHAN is not None:
        return f"the deepspeed command that has started process {_ORPHAN.pid} is gone"
    for launcher in _AT_START:
        if not launcher.runs:
            return f"the launcher of this process is gone ({launcher.name}, process {launcher.pid})"
    return None


_AT_START = tuple(launchers_of(Process.of(os.getpid())))
"""Found when this module is imported, which is before torch is: one that is lost meanwhile is missed as well."""
_ORPHAN = next((each for each in _AT_START[-1:] if each.is_started_by_deepspeed and each.is_adopted), None)
"""DeepSpeed's launcher on this host, where the command was killed even before that."""
