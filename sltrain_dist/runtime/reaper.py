"""A separate program, started by :mod:`.watchdog`, that kills launchers that outlive their ranks, and frozen ranks.

When a host is disconnected, its ranks end by their timeouts, but torchrun's agent may try to reach the store on the
other host for minutes. This process waits until its rank has ended for whatever reason, and then gives the launcher
more time than launchers give their other ranks (30 s). A launcher that still runs is killed with its remaining
ranks, which would otherwise be unsupervised. A rank that is stopped by a signal or frozen cannot end itself, and
is killed from here. Does not import torch: it is one small process per host.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ALIVE = b"."
"""Sent by the rank about once a second."""
ENDED_WELL = b"e"
"""Sent by the rank before it ends normally; its launcher is then left alone."""
PATIENCE_S = 35.0
_TERM_S = 3.0
_POLL_S = 0.2
_LAUNCHERS = re.compile(
    r"(.*/)?(torchrun|deepspeed|ds|deepspeed\.pt)|torch\.distributed\.(run|launch)|.*torch/distributed/run\.py"
    r"|deepspeed\.launcher\.(launch|runner)|.*deepspeed/launcher/(launch|runner)\.py"
)
"""Matches a launcher's program, or the module or script that Python runs."""


@dataclass(frozen=True)
class Process:
    """A process.

    Attributes:
        pid: Process id.
        started: Start time in kernel ticks, which tells the process from later ones with the same id.
        command: Command line.
    """

    pid: int
    started: str
    command: tuple[str, ...]

    @staticmethod
    def of(pid: int) -> Process | None:
        """Returns the process with this id; None if there is none, or it is a zombie."""
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return None
        return None if state in "ZX" else Process(pid, fields[18], tuple(command))

    @property
    def name(self) -> str:
        """The launcher's program or module; empty for other processes, even if a launcher is among their arguments."""
        words = iter(self.command)
        program = next(words, "")
        if program.rpartition("/")[2].startswith("python"):
            for program in words:
                if program in ("-X", "-W"):
                    next(words, "")
                elif not program.startswith("-"):
                    break
        return program if _LAUNCHERS.fullmatch(program) else ""

    @property
    def is_launcher(self) -> bool:
        """Whether it is torchrun or one of DeepSpeed's launchers."""
        return self.name != ""

    @property
    def is_started_by_deepspeed(self) -> bool:
        """Whether it is the launcher that the `deepspeed` command starts on each host."""
        return self.name.endswith(("launcher.launch", "launcher/launch.py"))

    @property
    def is_adopted(self) -> bool:
        """Whether its original parent has ended: children start in their parent's session."""
        parent = self.parent()
        with suppress(ProcessLookupError):
            session = os.getsid(self.pid)
            return session != self.pid and (parent is None or os.getsid(parent.pid) != session)
        return False

    @property
    def runs(self) -> bool:
        """Whether it is still running."""
        now = Process.of(self.pid)
        return now is not None and now.started == self.started

    def parent(self) -> Process | None:
        """Returns the process that started it, or the one that adopted it when that process ended."""
        try:
            return Process.of(int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1]))
        except OSError:
            return None

    def children(self) -> Iterator[Process]:
        """Yields the running processes that it has started."""
        with suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                for pid in (task / "children").read_text().split():
                    child = Process.of(int(pid))
                    if child is not None:
                        yield child

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process if it is still running."""
        if self.runs:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def reap(launcher: Process, who: str, patience_s: float) -> None:
    """Waits for the launcher to end, and kills it and its ranks after `patience_s`."""
    end = time.monotonic() + patience_s
    while launcher.runs:
        if time.monotonic() > end:
            break
        time.sleep(_POLL_S)
    else:
        return
    _say(
        f"{who} has ended {patience_s:.0f} s ago, but its launcher (process {launcher.pid}) has not; it may be waiting "
        "for a lost host; killing it"
    )
    ranks = list(launcher.children())
    launcher.signal(signal.SIGTERM)
    end = time.monotonic() + _TERM_S
    while launcher.runs and time.monotonic() < end:
        time.sleep(_POLL_S)
    for process in (launcher, *ranks):
        process.signal(signal.SIGKILL)


def listen(rank: Process, who: str, silence_s: float) -> bool:
    """Waits until the rank ends, which closes standard input. A rank that is silent for `silence_s` is killed.

    Returns:
        Whether the rank ended normally.
    """
    last = b""
    while select.select([0], [], [], silence_s)[0]:
        text = os.read(0, 4096)
        if not text:
            return last == ENDED_WELL
        last = text[-1:]
    if rank.runs:
        _say(f"{who} has been frozen for {silence_s:.0f} s, stopped by a signal or by its machine; killing it")
        rank.signal(signal.SIGKILL)
    return False


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Runs `reaper.py LAUNCHER STARTED SILENCE_S WHO`, the child of a rank that writes to its standard input."""
    launcher, rank = Process.of(int(sys.argv[1])), Process.of(os.getppid())
    started, silence_s, who = sys.argv[2:]
    if launcher is None or launcher.started != started or rank is None:
        return
    if not listen(rank, who, float(silence_s)):
        reap(launcher, who, PATIENCE_S)


if __name__ == "__main__":
    main()
