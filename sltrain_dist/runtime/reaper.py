"""Ends a launcher that outlives its ranks, and a rank that is frozen. A program of its own, run by :mod:`.watchdog`.

When a host is cut off, its ranks end by their timeouts, but torchrun's agent may go on talking to the store on the
other host for minutes. This process waits for its rank's end, however that comes about, and gives the launcher
longer than launchers give their other ranks (30 s). A launcher that is there even then is ended, with what is
left of its ranks, which nobody would look after. A rank that is stopped, or whose machine has frozen it, cannot end
itself, and is ended from here. No torch: it is one small process a host.
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
"""What a rank writes about once a second."""
ENDED_WELL = b"e"
"""What it writes before it ends in order; its launcher is left alone."""
PATIENCE_S = 35.0
_TERM_S = 3.0
_POLL_S = 0.2
_LAUNCHERS = re.compile(
    r"(.*/)?(torchrun|deepspeed|ds|deepspeed\.pt)|torch\.distributed\.(run|launch)|.*torch/distributed/run\.py"
    r"|deepspeed\.launcher\.(launch|runner)|.*deepspeed/launcher/(launch|runner)\.py"
)
"""The program of a launcher, or the module or script that Python runs."""


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
            state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return None
        return None if state in "ZX" else Process(pid, fields[18], tuple(command))

    @property
    def name(self) -> str:
        """The launcher's program or module; empty if it is something else, which may have one as an argument."""
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
        """Whether it is torchrun or one of DeepSpeed's launchers, and not a shell, say."""
        return self.name != ""

    @property
    def is_started_by_deepspeed(self) -> bool:
        """Whether it is the launcher that the `deepspeed` command starts on a host."""
        return self.name.endswith(("launcher.launch", "launcher/launch.py"))

    @property
    def is_adopted(self) -> bool:
        """Whether the process that has started it has ended: children are born into their parent's session."""
        parent = self.parent()
        with suppress(ProcessLookupError):
            session = os.getsid(self.pid)
            return session != self.pid and (parent is None or os.getsid(parent.pid) != session)
        return False

    @property
    def runs(self) -> bool:
        """Whether it still does."""
        now = Process.of(self.pid)
        return now is not None and now.started == self.started

    def parent(self) -> Process | None:
        """The process that has started it, or to which it was given when that one ended."""
        try:
            return Process.of(int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1]))
        except OSError:
            return None

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
    _say(
        f"{who} has ended {patience_s:.0f} s ago, but its launcher (process {launcher.pid}) has not; it may be waiting "
        "for a lost host; ending it"
    )
    ranks = list(launcher.children())
    launcher.signal(signal.SIGTERM)
    end = time.monotonic() + _TERM_S
    while launcher.runs and time.monotonic() < end:
        time.sleep(_POLL_S)
    for process in (launcher, *ranks):
        process.signal(signal.SIGKILL)


def listen(rank: Process, who: str, silence_s: float) -> bool:
    """Waits for the rank's end, which closes standard input; a rank that is silent for too long is ended.

    Returns:
        Whether it has ended well.
    """
    last = b""
    while select.select([0], [], [], silence_s)[0]:
        text = os.read(0, 4096)
        if not text:
            return last == ENDED_WELL
        last = text[-1:]
    if rank.runs:
        _say(f"{who} has been frozen for {silence_s:.0f} s, stopped by a signal or by its machine; ending it")
        rank.signal(signal.SIGKILL)
    return False


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """The program: `reaper.py LAUNCHER STARTED SILENCE_S WHO`, run by the rank, which writes to standard input."""
    launcher, rank = Process.of(int(sys.argv[1])), Process.of(os.getppid())
    started, silence_s, who = sys.argv[2:]
    if launcher is None or launcher.started != started or rank is None:
        return
    if not listen(rank, who, float(silence_s)):
        reap(launcher, who, PATIENCE_S)


if __name__ == "__main__":
    main()
