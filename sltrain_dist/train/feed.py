"""The rows of every update, on the device, and the data cursor that belongs to them.

On CUDA they are one update ahead: while the device computes an update, the rows of the next one are taken from the
loader, put into pinned memory and sent on a stream of their own, so that no update waits for a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sltrain_dist.train.step import Rows


class Loader(Protocol):
    """What of :class:`sltrain_dist.data.loader.TrainLoader` is needed here."""

    def __next__(self) -> Rows:
        """The rows of the next update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the rows that were returned last."""
        ...


class FedRows(NamedTuple):
    """This rank's rows of an update."""

    rows: Rows
    """On the host."""
    sent: Tensor
    """On the device, int32; the current stream waits for them."""


class _Ahead(NamedTuple):
    """What is ready of the next update."""

    state: Mapping[str, Any]
    """The cursor before it."""
    rows: Rows | None
    sent: Tensor | None
    failure: Exception | None
    """In place of rows: what the loader raised."""


class RowFeed:
    """Takes rows from a loader, ahead of time where that gains something.

    Args:
        loader: The rows of each update. Nobody else may take any.
        device: Where the model is.
        ahead: Whether :meth:`prepare` does anything. Default: on CUDA. On the CPU it would only move the wait.
    """

    def __init__(self, loader: Loader, device: torch.device, *, ahead: bool | None = None) -> None:
        self._loader, self._device = loader, device
        self._runs_ahead = device.type == "cuda" if ahead is None else ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: _Ahead | None = None

    def take(self) -> FedRows:
        """The rows of the next update.

        Raises:
            DataError: As the loader does, also where :meth:`prepare` has met it.
        """
        ready, self._next = self._next, None
        if ready is None:
            rows = next(self._loader)
            return FedRows(rows, self._receive(self._send(rows)))
        if ready.failure is not None:
            raise ready.failure
        assert ready.rows is not None
        assert ready.sent is not None
        return FedRows(ready.rows, self._receive(ready.sent))

    def prepare(self) -> None:
        """Gets the rows that :meth:`take` will return. What goes wrong is for the update that needs them to say."""
        if not self._runs_ahead or self._next is not None:
            return
        state = self._loader.state_dict()
        try:
            rows = next(self._loader)
        except Exception as error:  # whatever it is, `take` raises it
            self._next = _Ahead(state, None, None, error)
            return
        self._next = _Ahead(state, rows, self._send(rows), None)

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the rows that were taken last; those that only wait here do not count."""
        return dict(self._next.state) if self._next is not None else self._loader.state_dict()

    def _send(self, rows: Rows) -> Tensor:
        """Begins to copy rows to the device.

        Every update has pinned memory of its own, which nobody writes to again: torch's allocator gives it to
        another one when the copies that were begun from it are done, and not before.
        """
        if self._stream is None:
            return torch.from_numpy(rows).to(self._device)
        pinned = torch.from_numpy(rows).pin_memory()
        with torch.cuda.stream(self._stream):
            return pinned.to(self._device, non_blocking=True)

    def _receive(self, sent: Tensor) -> Tensor:
        """Makes the current stream wait for a copy, and its memory not be used again before this stream is done."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            sent.record_stream(current)
        return sent
