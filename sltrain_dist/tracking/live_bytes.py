"""Bytes of live tensors, as requested from an allocator, on any device and for fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageWatch(TorchDispatchMode):
    """Tracks all tensor storages that pass through the dispatcher, until they are freed.

    Scratch memory inside operators and collectives is not seen, nor the allocator's rounding. A resized storage, as in
    FSDP2, counts with its current size. Subclasses define what happens on each event.

    Args:
        inside: Functions that return an operator's scratch bytes, given its arguments, by operator.
    """

    supports_higher_order_operators = True  # compiled layers contain them

    def __init__(self, inside: dict[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self._inside = inside or {}
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._resize = torch.UntypedStorage.resize_

    def allocated(self, key: int, num_bytes: int) -> None:
        """Called for a new storage; `key` identifies it until it is freed."""
        raise NotImplementedError

    def freed(self, key: int, num_bytes: int) -> None:
        """Called when a storage is freed."""
        raise NotImplementedError

    def resized(self, key: int, before: int, after: int) -> None:
        """Called when a storage changes its size, in bytes."""
        raise NotImplementedError

    def passing(self, num_bytes: int) -> None:
        """Called for scratch bytes that an operator has allocated and freed while it ran."""
        raise NotImplementedError

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Returns True: it changes no result, so torch.compile stays enabled under it."""
        return True

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Starts tracking the storages of existing tensors."""
        for tensor in tensors:
            self._see(tensor)

    def __enter__(self) -> StorageWatch:
        resize, watch = self._resize, self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            watch._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor then calls the operator on its local tensor, which comes back here
        out = self.call(func, args, kwargs or {})
        if isinstance(out, Tensor):
            self._see(out)
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        inside = self._inside.get(func)
        if inside is not None:
            self.passing(inside(*args, **(kwargs or {})))
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator."""
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> int:
        """Returns the key of a tensor's storage, and starts tracking it if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages and tensor.device.type != "meta":
            size = storage.nbytes()
            self._storages[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)
            self.allocated(key, size)
        return key

    def _freed(self, key: int) -> None:
        self.freed(key, self._storages.pop(key)[1])

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            reference, before = self._storages[key]
            self._storages[key] = (reference, storage.nbytes())
            self.resized(key, before, storage.nbytes())


@dataclass
class Interval:
    """An interval of the tracked time.

    Attributes:
        name: Name given to :meth:`LiveBytes.begin`.
        peak: Largest number of live bytes in the interval.
    """

    name: Any
    peak: int


class LiveBytes(StorageWatch):
    """Counts the bytes live now, and their peak in each interval.

    Args: as for :class:`StorageWatch`.

    Attributes:
        live: Number of bytes live now.
        intervals: All intervals so far, in order; see :meth:`begin`.
    """

    def __init__(self, inside: dict[Any, Callable[..., int]] | None = None) -> None:
        super().__init__(inside)
        self.live = 0
        self.intervals = [Interval(None, 0)]

    @property
    def peak(self) -> int:
        """Largest number of live bytes in all intervals."""
        return max(interval.peak for interval in self.intervals)

    def begin(self, name: Any) -> None:
        """Ends the current interval and begins a new one."""
        self.intervals.append(Interval(name, self.live))

    def allocated(self, key: int, num_bytes: int) -> None:
        """See :class:`StorageWatch`."""
        self._count(num_bytes)

    def freed(self, key: int, num_bytes: int) -> None:
        """See :class:`StorageWatch`."""
        self._count(-num_bytes)

    def resized(self, key: int, before: int, after: int) -> None:
        """See :class:`StorageWatch`."""
        self._count(after - before)

    def passing(self, num_bytes: int) -> None:
        """See :class:`StorageWatch`."""
        self._count(num_bytes)
        self._count(-num_bytes)

    def _count(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.intervals[-1].peak = max(self.intervals[-1].peak, self.live)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the tensors' storages, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
