"""The bytes of live tensors, by component: what an allocator would be asked for, on any device and on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "temporaries"
"""The component of what is made outside of any scope."""


class _Known(NamedTuple):
    alive: weakref.ref[torch.UntypedStorage]
    size: int
    component: str
    born: int


@dataclass
class Stretch:
    """A part of what was followed, and its largest moment.

    Attributes:
        name: What was going on.
        peak: Most bytes at a time.
        components: The bytes then, by component: what storages are known to be at the end of the stretch.
        at: Operators that had run then.
    """

    name: Any
    peak: int
    components: dict[str, int]
    at: int = 0


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensor storages that come through the dispatcher, until they are freed.

    Scratch memory inside of operators and collectives is not seen, nor the allocator's rounding. A storage belongs
    to the component whose scope it was made in, until :meth:`assign` says otherwise; a storage that is resized, as
    FSDP2 does, counts as what it is at the time.

    Args:
        inside: Bytes that an operator takes while it runs, by the operator: called with its arguments.

    Attributes:
        live: Bytes at the moment.
        components: The same by component.
        stretches: What was followed, in its order; see :meth:`begin`.
    """

    supports_higher_order_operators = True  # those of compiled blocks pass through

    def __init__(self, inside: dict[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.live = 0
        self.components: dict[str, int] = {}
        self.stretches = [Stretch(None, 0, {})]
        self._operators = 0
        self._inside = inside or {}
        self._known: dict[int, _Known] = {}
        self._scopes = [OTHER]
        self._resize = torch.UntypedStorage.resize_

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes no result, so that torch.compile need not stand aside for it."""
        return True

    @property
    def peak(self) -> int:
        """Most bytes at a time."""
        return max(stretch.peak for stretch in self.stretches)

    @property
    def scope(self) -> str:
        """The component of what is made now."""
        return self._scopes[-1]

    @contextmanager
    def within(self, component: str) -> Iterator[None]:
        """What is made in the block belongs to `component`."""
        self._scopes.append(component)
        try:
            yield
        finally:
            self._scopes.pop()

    def begin(self, name: Any) -> None:
        """Begins a stretch; the last one ends."""
        self.stretches.append(Stretch(name, self.live, dict(self.components), self._operators))

    def add(self, tensors: Iterable[Tensor], component: str | None = None) -> None:
        """Counts storages that exist already; those that are known stay what they are."""
        for tensor in tensors:
            self._see(tensor, component or self.scope)
        self._note()

    def assign(self, tensors: Iterable[Tensor], component: str, *, only: str = "") -> None:
        """Says what storages belong to; those that are not known are counted from now on.

        Args:
            tensors: Some tensors.
            component: What they belong to.
            only: Storages of other components than those that begin so stay what they are.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known.get(storage._cdata)
            if known is None:
                self._see(tensor, component)
            elif known.component != component and known.component.startswith(only):
                self._move(storage._cdata, known, component)
        self._note()

    def rename(self, component: str, to: str) -> None:
        """Moves all that lives of a component to another one."""
        for key, known in self._known.items():
            if known.component == component:
                self._move(key, known, to)
        self._note()

    def __enter__(self) -> LiveBytes:
        resize, tracker = self._resize, self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracker._resized(storage)
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
        self._operators += 1
        out = self.call(func, args, kwargs or {})
        if isinstance(out, Tensor):
            self._see(out, self.scope)
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf, self.scope)
        inside = self._inside.get(func)
        if inside is not None:
            self._passing(inside(*args, **(kwargs or {})))
        self._note()
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator."""
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor, component: str) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = _Known(weakref.ref(storage, lambda _: self._freed(key)), size, component, self._operators)
        self.live += size
        self._count(component, size)

    def _move(self, key: int, known: _Known, component: str) -> None:
        """Makes a storage a component's, also at the stretch's peak, if it was there.

        If it has not belonged to any yet, then at the peaks of earlier stretches as well.
        """
        sums = [self.components]
        for stretch in reversed(self.stretches):
            if known.born > stretch.at:
                break
            sums.append(stretch.components)
            if known.component != OTHER:
                break
        for components in sums:
            components[known.component] -= known.size
            components[component] = components.get(component, 0) + known.size
        self._known[key] = known._replace(component=component)

    def _count(self, component: str, size: int) -> None:
        self.components[component] = self.components.get(component, 0) + size

    def _freed(self, key: int) -> None:
        known = self._known.pop(key)
        self.live -= known.size
        self._count(known.component, -known.size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._known.get(storage._cdata)
        if known is None:
            return
        size = storage.nbytes()
        self.live += size - known.size
        self._count(known.component, size - known.size)
        self._known[storage._cdata] = known._replace(size=size)
        self._note()

    def _note(self) -> None:
        stretch = self.stretches[-1]
        if self.live > stretch.peak:
            stretch.peak, stretch.components, stretch.at = self.live, dict(self.components), self._operators

    def _passing(self, size: int) -> None:
        """Takes bytes that are gone again."""
        self.live += size
        self._count(self.scope, size)
        self._note()
        self.live -= size
        self._count(self.scope, -size)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
