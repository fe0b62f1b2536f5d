"""Stopping on request: signals, the STOP file, and a lost launcher, acted on between two updates or batches."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from sltrain_dist.runtime.launchers import lost_launcher

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopAgreed(Exception):  # noqa: N818 (not an error)
    """All ranks have agreed to stop here; says why."""


class StopRequest:
    """Notes that this process was asked to stop. The ranks agree on it between updates, and while they evaluate.

    A second Ctrl-C interrupts at once, without saving. Under `nohup` a closed terminal is no request.

    Args:
        run_dir: A file named STOP in it is a request too.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "STOP"
        self._signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handles SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 from now on."""
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Gives the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal:
            return self._signal
        return f"{self._file} is there" if self._file.exists() else lost_launcher()

    def acknowledge(self) -> None:
        """Removes the STOP file, so that the run can be started again."""
        self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = f"received {signal.Signals(number).name}"
