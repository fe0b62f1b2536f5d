"""Stop requests by signals, the STOP file or a lost launcher, acted on between two updates or evaluation batches."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from sltrain_dist.config.run_files import STOP
from sltrain_dist.runtime.launchers import lost_launcher

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopAgreed(Exception):  # noqa: N818 (not an error)
    """Raised on all ranks when they have agreed to stop; the message is the reason."""


class StopRequest:
    """Requests to stop this process, on which the ranks agree between updates and evaluation batches.

    A second Ctrl-C interrupts at once, without saving. Under `nohup`, closing the terminal is not a request.

    Args:
        run_dir: The run directory, where a file named STOP is a request too.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP
        self._signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Installs handlers of SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2."""
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def reason(self) -> str | None:
        """Returns the reason to stop, or None if there is no request."""
        if self._signal:
            return self._signal
        return f"found {self._file}" if self._file.exists() else lost_launcher()

    def acknowledge(self) -> None:
        """Removes the STOP file, so that the run can be started again."""
        self._file.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = f"received {signal.Signals(number).name}"
