"""The rows of every update, on the device, and the data cursor that belongs to them.

On CUDA they are one update ahead: while the device computes an update, the rows of the next one are taken from the
loader, put into pinned memory and sent on a stream of their own, so that no update waits for a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sltrain_dist.train.step import Rows


class RowLoader(Protocol):
    """What of :class:`sltrain_dist.data.loader.TrainLoader` is needed here."""

    def __next__(self) -> Rows:
        """The rows of the next update."""
        ...

    def wait(self, asked: Callable[[], object]) -> bool:
        """Waits until :meth:`__next__` has nothing to wait for, and returns true; false as soon as `asked` is."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the rows that were returned last."""
        ...


class FedRows(NamedTuple):
    """This rank's rows of an update."""

    rows: Rows
    """On the host."""
    sent: Tensor
    """On the device, int32."""


class _Ahead(NamedTuple):
    """What is ready of the next update."""

    state: dict[str, Any]
    """The cursor before it."""
    outcome: FedRows | Exception
    """Its rows, on their way to the device, or what the loader raised in their place."""


class RowFeed:
    """Takes rows from a loader, ahead of time where that gains something.

    Args:
        loader: The rows of each update. Nobody else may take any.
        device: Where the model is.
        ahead: Whether :meth:`prepare` does anything. Default: on CUDA. On the CPU it would only move the wait.
    """

    def __init__(self, loader: RowLoader, device: torch.device, *, ahead: bool | None = None) -> None:
        self._loader, self._device = loader, device
        self._runs_ahead = device.type == "cuda" if ahead is None else ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: _Ahead | None = None

    def wait(self, asked: Callable[[], object]) -> None:
        """Waits for the rows that :meth:`take` will return, or until `asked` is true."""
        if self._next is None:
            self._loader.wait(asked)

    def take(self) -> FedRows:
        """The rows of the next update, for which the current stream waits.

        Raises:
            DataError: As the loader does, also where :meth:`prepare` has met it.
        """
        ready, self._next = self._next, None
        fed = self._send(next(self._loader)) if ready is None else ready.outcome
        if isinstance(fed, Exception):
            raise fed
        self._await(fed.sent)
        return fed

    def prepare(self, asked: Callable[[], object] = lambda: False) -> None:
        """Gets the rows that :meth:`take` will return, unless `asked` is true before they have come.

        What goes wrong is for the update that needs them to say.
        """
        if not self._runs_ahead or self._next is not None:
            return
        state = self._loader.state_dict()
        outcome: FedRows | Exception
        try:
            if not self._loader.wait(asked):
                return
            outcome = self._send(next(self._loader))
        except Exception as error:  # whatever it is, `take` raises it
            outcome = error
        self._next = _Ahead(state, outcome)

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the rows that were taken last; those that only wait here do not count."""
        return self._next.state if self._next is not None else self._loader.state_dict()

    def _send(self, rows: Rows) -> FedRows:
        """Begins to copy rows to the device.

        Every update has pinned memory of its own, which nobody writes to again: torch's allocator gives it to
        another one when the copies that were begun from it are done, and not before.
        """
        if self._stream is None:
            return FedRows(rows, torch.from_numpy(rows).to(self._device))
        pinned = torch.from_numpy(rows).pin_memory()
        with torch.cuda.stream(self._stream):
            return FedRows(rows, pinned.to(self._device, non_blocking=True))

    def _await(self, sent: Tensor) -> None:
        """Makes the current stream wait for a copy, and its memory not be used again before this stream is done."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            sent.record_stream(current)
