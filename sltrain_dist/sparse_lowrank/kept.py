"""What selective activation checkpointing keeps of the linear layers, so that recomputation does not multiply again.

A sparse plus low-rank layer takes several operators to its output: some write into it in place, some build W, which
must not be kept. So no operator of it is kept by itself; the layer hands its whole computation to :func:`keep`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Computed = tuple[tuple[Tensor, ...], Tensor | None]
"""The outputs of layers that share an input, and a tensor that they save for the backward pass, or None."""


class _Current(threading.local):
    """The checkpointed forward pass that this thread is in: the backward pass may recompute in another thread."""

    results: KeptResults | None = None


_current = _Current()


def keep(compute: Callable[[], Computed]) -> Computed:
    """Computes what layers need of matrix products, or takes it from the forward pass that is made again.

    Outside of :class:`KeptResults`, it only calls `compute`. What it returns must not be written to.
    """
    if torch.compiler.is_compiling() or _current.results is None:  # policies of torch.compile are by operator
        return compute()
    return _current.results.layers(compute)


def keeps() -> bool:
    """Whether outputs are kept, and must not be written to."""
    return not torch.compiler.is_compiling() and _current.results is not None


class KeptResults(TorchDispatchMode):
    """Keeps the results of linear layers and of given operators in a forward pass; hands them out when it is repeated.

    Like torch's `create_selective_checkpoint_contexts`, but for layers as a whole as well. Two are made for a pass,
    see :meth:`pair`.

    Args:
        operators: Operators whose results are kept, where they are not part of a sparse plus low-rank layer.
        results: What is kept, in the order in which it was computed; shared by the two.
        again: Whether this is for the repetition.
    """

    def __init__(self, operators: Collection[Any], results: deque[Any], *, again: bool) -> None:
        super().__init__()
        self._operators, self._results, self._again = operators, results, again
        self._inside = False
        self._outer: KeptResults | None = None

    @classmethod
    def pair(cls, operators: Collection[Any]) -> tuple[KeptResults, KeptResults]:
        """The contexts of a forward pass and of its repetition, as `torch.utils.checkpoint` takes them."""
        results: deque[Any] = deque()
        return cls(operators, results, again=False), cls(operators, results, again=True)

    def __enter__(self) -> KeptResults:
        self._outer, _current.results = _current.results, self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _current.results = self._outer
        if self._again:
            self._results.clear()  # torch stops as soon as it has what the backward pass needs
        elif self._results:
            self._results.append(_without_outputs(self._results.pop()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside or func not in self._operators:
            return func(*args, **(kwargs or {}))
        return self._keep(func, lambda: (func(*args, **(kwargs or {})), None))[0]

    def layers(self, compute: Callable[[], Computed]) -> Computed:
        """The outputs of linear layers."""
        return self._keep("linear layers", compute)

    def _keep(self, name: Any, compute: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        if self._again:
            kept, result = self._results.popleft() if self._results else (None, None)
            if kept != name:
                raise RuntimeError(
                    f"the repeated forward pass takes {name} where the first one took {kept}: each result can be used "
                    "in one backward pass, and the passes must not differ"
                )
            return tree_map_only(_Kept, _Kept.unchanged, result)
        self._inside = True
        try:
            result = compute()
        finally:
            self._inside = False
        self._results.append((name, tree_map_only(Tensor, _Kept, result)))
        return result


class _Kept:
    """A tensor without its graph, which would keep this very object alive, and its version."""

    def __init__(self, tensor: Tensor) -> None:
        # As torch.utils.checkpoint: below autograd, where operators arrive, versions are not shared otherwise.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = tensor._version

    def unchanged(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError("a result that activation checkpointing keeps was written to")
        return self.tensor

    def unread(self) -> _Kept:
        """NaN in the same shape, which takes no memory."""
        return _Kept(self.tensor.new_full((), torch.nan).expand(self.tensor.shape))


def _without_outputs(entry: tuple[Any, tuple[Any, Any]]) -> tuple[Any, tuple[Any, Any]]:
    """The last result of a decoder layer, whose outputs are only added to the residual stream and so not read again."""
    name, (outputs, saved) = entry
    return name, (tree_map_only(_Kept, _Kept.unread, outputs), saved)
