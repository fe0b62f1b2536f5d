"""The bytes of live tensors: what an allocator would be asked for, on any device and on fake tensors."""

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
    """Sees all tensor storages that come through the dispatcher, until they are freed.

    Scratch memory inside of operators and collectives is not seen, nor the allocator's rounding. A storage that is
    resized, as FSDP2 does, counts as what it is at the time. Subclasses say what is done with what is seen.

    Args:
        inside: Bytes that an operator takes while it runs, by the operator: called with its arguments.
    """

    supports_higher_order_operators = True  # those of compiled layers pass through

    def __init__(self, inside: dict[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self._inside = inside or {}
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._resize = torch.UntypedStorage.resize_

    def allocated(self, key: int, num_bytes: int) -> None:
        """Called for a new storage; `key` is its own until it is freed."""
        raise NotImplementedError

    def freed(self, key: int, num_bytes: int) -> None:
        """Called when a storage is freed."""
        raise NotImplementedError

    def resized(self, key: int, before: int, after: int) -> None:
        """Called when a storage changes its size in bytes."""
        raise NotImplementedError

    def passing(self, num_bytes: int) -> None:
        """Called for bytes that an operator has taken and given back while it ran."""
        raise NotImplementedError

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes no result, so that torch.compile need not stand aside for it."""
        return True

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts storages that exist already."""
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
            return NotImplemented  # it calls operators on its local tensor, which come here
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
        """The key of a tensor's storage, which is counted if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and tensor.device.type != "meta":
            size = storage.nbytes()
            self._known[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)
            self.allocated(key, size)
        return key

    def _freed(self, key: int) -> None:
        self.freed(key, self._known.pop(key)[1])

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            alive, before = self._known[key]
            self._known[key] = (alive, storage.nbytes())
            self.resized(key, before, storage.nbytes())


@dataclass
class Interval:
    """A part of what was watched.

    Attributes:
        name: What was going on.
        peak: Most bytes that were live at a time.
    """

    name: Any
    peak: int


class LiveBytes(StorageWatch):
    """The live bytes of the moment, and their peaks.

    Args: as of :class:`StorageWatch`.

    Attributes:
        live: Bytes that are live now.
        intervals: What was watched, in its order; see :meth:`begin`.
    """

    def __init__(self, inside: dict[Any, Callable[..., int]] | None = None) -> None:
        super().__init__(inside)
        self.live = 0
        self.intervals = [Interval(None, 0)]

    @property
    def peak(self) -> int:
        """Most bytes that were live at a time."""
        return max(interval.peak for interval in self.intervals)

    def begin(self, name: Any) -> None:
        """Begins an interval; the last one ends."""
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
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
