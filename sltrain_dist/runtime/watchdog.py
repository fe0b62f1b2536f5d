"""A watchdog that ends a process without progress, whatever it is stuck in, so that a run never hangs.

Collectives time out by themselves, but a process can also wait for a lost file system, a library's own store, or a
launcher that tries to reach a dead host. The training code reports progress with :func:`beat`, and a thread checks
the time since the last report. The thread is backed by faulthandler's timer in C, which does not need the global
interpreter lock. A second process, :mod:`.reaper`, watches the launcher of the training process.

One limit is enough for all phases: if one rank takes longer than `parallel.timeout_s`, the next collective of the
other ranks fails anyway.
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
"""Time for a collective's own timeout to fire first, since its error is more informative."""
WARM_UP_S = 600.0
"""Additional time until the end of the first update, in which libraries compile kernels. The timeout of collectives
is not extended, so that a lost rank is noticed as fast as later."""
_BACKSTOP_S = 5.0
"""Delay after which the C timer ends a process whose interpreter is stuck."""
_REPORT_S = 3.0
"""Time limit for writing exit.json, since the file system may be what hangs."""

Report = Callable[[str], object]


class Watchdog:
    """A watchdog of this process, which runs from construction on and ends the process if it makes no progress.

    Args:
        who: Name of this process in messages.
        limit_s: Seconds without progress after which the process is ended.
        why: Explanation of the limit, for the message.
        alive: Called about once a second while this process runs.
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
        """Reports progress, and what the process does next."""
        self._last, self._doing = time.monotonic(), doing

    def allow(self, extra_s: float) -> None:
        """Extends the limit by `extra_s`, until the next call."""
        self._last, self._extra_s = time.monotonic(), extra_s

    def report_to(self, report: Report) -> None:
        """Sets a function that is called with the reason before the process is ended; it may block or fail."""
        self._report = report

    def hurry(self, within_s: float) -> None:
        """Gives the process `within_s` seconds to end, whatever progress it reports."""
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
                # While this thread runs, the timer is reset at least once a second and does not fire.
                faulthandler.dump_traceback_later(left + _BACKSTOP_S, exit=True, file=sys.__stderr__ or 2)
                armed = end
            if self._stopped.wait(min(left, interval_s)):
                return

    def _end(self) -> None:
        reason = (
            f"{self._who} has made no progress for {time.monotonic() - self._last:.0f} s ({self._why}) while "
            f"{self._doing}: it or a process that it waits for is stuck, stopped or lost; check the other ranks' "
            "output, the hosts, the network and the file system"
        )
        # Not sys.stderr, whose lock the stuck thread may hold.
        os.write(2, f"error: {reason}\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        if self._report is not None:
            reporter = threading.Thread(target=self._report, args=(reason,), daemon=True)
            reporter.start()
            reporter.join(_REPORT_S)
        os._exit(1)


_watchdog: Watchdog | None = None
_reaper: subprocess.Popen[bytes] | None = None


def start(rank: int, world_size: int, local_rank: int, timeout_s: float) -> None:
    """Watches this process, one of several, until :func:`stop`, and its launcher after this process has ended.

    Args:
        rank: This process's rank.
        world_size: Number of processes; a single process waits for no other, and is not watched.
        local_rank: Rank on this host; local rank 0 starts the reaper for the launcher.
        timeout_s: `parallel.timeout_s`.
    """
    global _watchdog, _reaper
    if world_size == 1 or _watchdog is not None:
        return
    who, limit_s = f"rank {rank} on {socket.gethostname()}", timeout_s + GRACE_S
    # With --max-restarts, torchrun restarts ranks, and must be allowed to outlive them.
    if local_rank == 0 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        _reaper = _start_reaper(who, limit_s + _BACKSTOP_S)
    why = f"parallel.timeout_s = {timeout_s:g} and {GRACE_S:g} more"
    _watchdog = Watchdog(who, limit_s, why, lambda: _write_to_reaper(reaper.ALIVE))
    _watchdog.allow(WARM_UP_S)


def beat(doing: str) -> None:
    """Reports progress, if this process is watched. The cost is negligible.

    Args:
        doing: What the process does next, as in "has made no progress while …".
    """
    if _watchdog is not None:
        _watchdog.beat(doing)


def warmed_up() -> None:
    """Ends the additional time of the first update."""
    if _watchdog is not None:
        _watchdog.allow(0.0)


def report_to(report: Report) -> None:
    """Sets a function that is called with the reason if the watchdog ends this process."""
    if _watchdog is not None:
        _watchdog.report_to(report)


def hurry(within_s: float) -> None:
    """Gives this process, if it is watched, `within_s` seconds to end."""
    if _watchdog is not None:
        _watchdog.hurry(within_s)


def stop() -> None:
    """Stops watching this process and its launcher, because the run has ended normally."""
    global _watchdog, _reaper
    if _watchdog is not None:
        _watchdog.stop()
    if _reaper is not None and _reaper.stdin is not None:
        _write_to_reaper(reaper.ENDED_WELL)
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


def _write_to_reaper(what: bytes) -> None:
    if _reaper is not None and _reaper.stdin is not None:
        # The reaper may have been killed by a signal that the launcher sends to all, or be stopped and not read.
        with suppress(BrokenPipeError, BlockingIOError):
            os.write(_reaper.stdin.fileno(), what)
