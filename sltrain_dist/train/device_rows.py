"""The rows of every update on the device, with the data cursor that belongs to them.

On CUDA, rows are prefetched: while the device computes an update, the rows of the next one are taken from the loader,
copied to pinned memory and sent on a separate stream, so that no update waits for a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sltrain_dist.train.step import Rows


class RowLoader(Protocol):
    """The part of :class:`sltrain_dist.data.loader.TrainLoader` that is used here."""

    def __next__(self) -> Rows:
        """Returns the rows of the next update."""
        ...

    def wait(self, stop_requested: Callable[[], object]) -> bool:
        """Waits until :meth:`__next__` will not block; returns False if `stop_requested` becomes true first."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the cursor after the last returned rows."""
        ...


class DeviceRows(NamedTuple):
    """This rank's rows of an update."""

    rows: Rows
    """The rows on the host."""
    on_device: Tensor
    """The rows on the device, int32."""


class _Prefetched(NamedTuple):
    """The prefetched rows of the next update."""

    state: dict[str, Any]
    """The cursor before these rows."""
    outcome: DeviceRows | Exception
    """The rows, whose copy to the device may be in progress, or the exception that the loader raised."""


class RowPrefetcher:
    """Takes rows from a loader and sends them to the device, one update ahead on CUDA.

    Args:
        loader: The loader of the rows, which nothing else may read.
        device: Device of the model.
        ahead: Whether :meth:`prepare` prefetches. Default: on CUDA only; on the CPU there is nothing to gain.
    """

    def __init__(self, loader: RowLoader, device: torch.device, *, ahead: bool | None = None) -> None:
        self._loader, self._device = loader, device
        self._prefetches = device.type == "cuda" if ahead is None else ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: _Prefetched | None = None

    def wait(self, stop_requested: Callable[[], object]) -> None:
        """Waits until :meth:`take` will not block, or until `stop_requested` is true."""
        if self._next is None:
            self._loader.wait(stop_requested)

    def take(self) -> DeviceRows:
        """Returns the rows of the next update, and makes the current stream wait for their copy.

        Raises:
            DataError: The loader raised it, now or in :meth:`prepare`.
        """
        prefetched, self._next = self._next, None
        outcome = self._send(next(self._loader)) if prefetched is None else prefetched.outcome
        if isinstance(outcome, Exception):
            raise outcome
        self._await(outcome.on_device)
        return outcome

    def prepare(self, stop_requested: Callable[[], object] = lambda: False) -> None:
        """Prefetches the rows that :meth:`take` will return, unless `stop_requested` becomes true first.

        Exceptions are raised by :meth:`take`, in the update that needs the rows.
        """
        if not self._prefetches or self._next is not None:
            return
        state = self._loader.state_dict()
        outcome: DeviceRows | Exception
        try:
            if not self._loader.wait(stop_requested):
                return
            outcome = self._send(next(self._loader))
        except Exception as error:  # raised by `take`
            outcome = error
        self._next = _Prefetched(state, outcome)

    def state_dict(self) -> dict[str, Any]:
        """Returns the cursor after the last rows that were taken; prefetched rows do not count."""
        return self._next.state if self._next is not None else self._loader.state_dict()

    def _send(self, rows: Rows) -> DeviceRows:
        """Starts the copy of rows to the device.

        Every update uses new pinned memory, which is never written to again: torch's allocator reuses it only when
        the copies from it are complete.
        """
        if self._stream is None:
            return DeviceRows(rows, torch.from_numpy(rows).to(self._device))
        pinned = torch.from_numpy(rows).pin_memory()
        with torch.cuda.stream(self._stream):
            return DeviceRows(rows, pinned.to(self._device, non_blocking=True))

    def _await(self, on_device: Tensor) -> None:
        """Makes the current stream wait for a copy, and keeps the memory until the stream has used it."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            on_device.record_stream(current)
