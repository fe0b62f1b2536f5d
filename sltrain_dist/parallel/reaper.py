"""Ends a launcher that outlives its ranks. A program of its own, without torch, run by :mod:`.watchdog`.

When a host is cut off, its ranks end by their timeouts, but torchrun's agent may go on talking to the store on the
other host for minutes. This process waits for its rank's end, however that comes about, and gives the launcher
longer than launchers give their other ranks (30 s). A launcher that is there even then is ended, with what is
left of its ranks, which nobody would look after.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ENDED_WELL = b"ended well"
"""What a rank writes before it ends in order; its launcher is left alone."""
PATIENCE_S = 35.0
_TERM_S = 3.0
_POLL_S = 0.2
_LAUNCHERS = re.compile(
    r"(.*/)?torchrun|torch\.distributed\.run|.*torch/distributed/run\.py|deepspeed\.launcher\.launch"
)
"""In the beginning of a launcher's command line, as one whole argument."""


@dataclass(frozen=True)
class Process:
    """A process that is running.

    Attributes:
        pid: Its id.
        started: When it started, in the kernel's ticks: ids are given again, to other processes.
        command: Its command line.
    """

    pid: int
    started: str
    command: tuple[str, ...]

    @staticmethod
    def of(pid: int) -> Process | None:
        """The process with this id; None if there is none, or it has ended and waits for its parent."""
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return None
        return None if state in "ZX" else Process(pid, fields[18], tuple(command))

    @property
    def is_launcher(self) -> bool:
        """Whether it is torchrun or DeepSpeed's launcher on a host, and not a shell, say."""
        return any(_LAUNCHERS.fullmatch(argument) for argument in self.command[:5])

    @property
    def runs(self) -> bool:
        """Whether it still does."""
        now = Process.of(self.pid)
        return now is not None and now.started == self.started

    def children(self) -> Iterator[Process]:
        """The processes that it has started."""
        with suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                for pid in (task / "children").read_text().split():
                    child = Process.of(int(pid))
                    if child is not None:
                        yield child

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        if self.runs:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def reap(launcher: Process, who: str, patience_s: float) -> None:
    """Waits for the launcher's end, and brings it about if that takes too long."""
    end = time.monotonic() + patience_s
    while launcher.runs:
        if time.monotonic() > end:
            break
        time.sleep(_POLL_S)
    else:
        return
    print(
        f"error: {who} has ended {patience_s:.0f} s ago, but its launcher (process {launcher.pid}) has not; it may be "
        "waiting for a lost host; ending it",
        file=sys.stderr,
        flush=True,
    )
    ranks = list(launcher.children())
    launcher.signal(signal.SIGTERM)
    end = time.monotonic() + _TERM_S
    while launcher.runs and time.monotonic() < end:
        time.sleep(_POLL_S)
    for process in (launcher, *ranks):
        process.signal(signal.SIGKILL)


def main() -> None:
    """The program: `reaper.py PID STARTED WHO`, with standard input from the rank."""
    pid, started, who = sys.argv[1:]
    launcher = Process.of(int(pid))
    if sys.stdin.buffer.read() == ENDED_WELL or launcher is None or launcher.started != started:
        return
    reap(launcher, who, PATIENCE_S)


if __name__ == "__main__":
    main()
