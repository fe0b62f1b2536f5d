"""Ends a process that makes no progress, whatever it is stuck in: a run never hangs.

Collectives time out by themselves, but not everything that waits is a collective: a file system that is gone, a
library's own store, a launcher that talks to a dead host. The watchdog asks nobody: the training code reports
progress with :func:`beat`, a thread looks at when it last did, and behind the thread stands a timer of the
interpreter's own in C, which needs no global interpreter lock. A second process, :mod:`.reaper`, does the same for
the launcher above the training process.

One limit serves everything: a phase that takes one rank longer than `parallel.timeout_s` makes the others' next
collective fail anyway.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sltrain_dist.runtime import reaper

GRACE_S = 15.0
"""A collective's own timeout comes first: its error says more than that nothing happened."""
WARM_UP_S = 600.0
"""More time until the first update is made: libraries compile what they need. Collectives keep their timeout there
too, so that a lost rank is found as fast as ever."""
_BACKSTOP_S = 5.0
"""Then the timer ends a process whose interpreter is itself stuck."""
_REPORT_S = 3.0
"""How long writing exit.json may take: the file system may be what hangs."""

Report = Callable[[str], None]


class Watchdog:
    """Watches this process from now on.

    Args:
        who: How messages name this process.
        limit_s: Seconds without progress after which it ends.
        why: What the limit is made of, for the message.
        alive: Called about once a second, as long as this process runs at all.
    """

    def __init__(self, who: str, limit_s: float, why: str, alive: Callable[[], None] = lambda: None) -> None:
        self._who, self._limit_s, self._why, self._alive = who, limit_s, why, alive
        self._last, self._doing, self._extra_s = time.monotonic(), "starting", 0.0
        self._deadline: float | None = None
        self._report: Report | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str) -> None:
        """Reports progress, and what is being done from here on."""
        self._last, self._doing = time.monotonic(), doing

    def allow(self, extra_s: float) -> None:
        """Has the limit be longer by so much, until this is called again."""
        self._last, self._extra_s = time.monotonic(), extra_s

    def report_to(self, report: Report) -> None:
        """Has the reason told to `report` before the process ends; it may block or fail."""
        self._report = report

    def hurry(self, within_s: float) -> None:
        """From now on progress does not help: the process is ending, and must have ended in `within_s`."""
        self._doing = "ending"
        self._deadline = time.monotonic() + within_s

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        interval_s = min(1.0, self._limit_s / 10)
        armed = None
        while True:
            end = self._last + self._limit_s + self._extra_s if self._deadline is None else self._deadline
            left = end - time.monotonic()
            if left <= 0:
                self._end()
            self._alive()
            if armed != end:
                # Far from its end while this thread gets to run: it is set anew at least once a second.
                faulthandler.dump_traceback_later(left + _BACKSTOP_S, exit=True, file=sys.__stderr__ or 2)
                armed = end
            if self._stopped.wait(min(left, interval_s)):
                return

    def _end(self) -> None:
        reason = (
            f"{self._who} has made no progress for {time.monotonic() - self._last:.0f} s ({self._why}) while "
            f"{self._doing}: it or a process that it waits for is stuck, stopped or lost; look at the other ranks' "
            "output, the hosts, the network and the file system"
        )
        # Not through sys.stderr, whose lock the stuck thread may hold.
        os.write(2, f"error: {reason}\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        if self._report is not None:
            teller = threading.Thread(target=self._report, args=(reason,), daemon=True)
            teller.start()
            teller.join(_REPORT_S)
        os._exit(1)


_watchdog: Watchdog | None = None
_reaper: subprocess.Popen[bytes] | None = None


def start(rank: int, world_size: int, local_rank: int, timeout_s: float) -> None:
    """Has this process, one of several, watched until :func:`stop`, and its launcher after this process's end.

    Args:
        rank: This process's rank.
        world_size: Processes in all; alone there is nothing to wait for, and nothing is watched.
        local_rank: Rank on this host; one process a host sees to the launcher.
        timeout_s: `parallel.timeout_s`.
    """
    global _watchdog, _reaper
    if world_size == 1 or _watchdog is not None:
        return
    who, limit_s = f"rank {rank} on {socket.gethostname()}", timeout_s + GRACE_S
    # torchrun starts ranks again where it was asked to: then its outliving them is no fault.
    if local_rank == 0 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        _reaper = _start_reaper(who, limit_s + _BACKSTOP_S)
    why = f"parallel.timeout_s = {timeout_s:g} and {GRACE_S:g} more"
    _watchdog = Watchdog(who, limit_s, why, lambda: _tell_reaper(reaper.ALIVE))
    _watchdog.allow(WARM_UP_S)


def beat(doing: str) -> None:
    """Reports progress, if this process is watched; costs nothing.

    Args:
        doing: What is done from here on, as in "the process was … when it stopped making progress".
    """
    if _watchdog is not None:
        _watchdog.beat(doing)


def warmed_up() -> None:
    """Says that an update has been made, after which nothing should take longer than the limit."""
    if _watchdog is not None:
        _watchdog.allow(0.0)


def report_to(report: Report) -> None:
    """Has the reason told to `report`, if this process is watched and the watchdog ends it."""
    if _watchdog is not None:
        _watchdog.report_to(report)


def hurry(within_s: float) -> None:
    """Gives this process, if it is watched, so many seconds to end."""
    if _watchdog is not None:
        _watchdog.hurry(within_s)


def stop() -> None:
    """Stops watching: the run has ended well, and the launcher will see to its own end."""
    global _watchdog, _reaper
    if _watchdog is not None:
        _watchdog.stop()
    if _reaper is not None and _reaper.stdin is not None:
        _tell_reaper(reaper.ENDED_WELL)
        _reaper.stdin.close()
        _reaper.wait()
    _watchdog = _reaper = None


def _start_reaper(who: str, silence_s: float) -> subprocess.Popen[bytes] | None:
    launcher = reaper.Process.of(os.getppid())
    if launcher is None or not launcher.is_launcher:
        return None
    program = [sys.executable, "-I", "-S", str(Path(reaper.__file__))]
    process = subprocess.Popen(
        [*program, str(launcher.pid), launcher.started, str(silence_s), who],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # torchrun ends the sessions of its ranks
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process


def _tell_reaper(what: bytes) -> None:
    if _reaper is not None and _reaper.stdin is not None:
        # It may have been ended by a signal that the launcher sends to all, or be stopped and not read.
        with suppress(BrokenPipeError, BlockingIOError):
            os.write(_reaper.stdin.fileno(), what)
