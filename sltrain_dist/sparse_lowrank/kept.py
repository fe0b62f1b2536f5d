"""Selective activation checkpointing of linear layers: keeps their outputs, so that no product is recomputed.

A sparse plus low-rank layer runs several operators: some write into its output in place, some build W, which must not
be kept. So none of its operators is kept by itself; the layer passes its whole computation to :func:`keep`.
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
    """The checkpointed forward pass that this thread runs: the backward pass may recompute in another thread."""

    results: KeptResults | None = None


_current = _Current()


def keep(compute: Callable[[], Computed]) -> Computed:
    """Computes the outputs of linear layers, or in recomputation returns those that the forward pass kept.

    Outside of :class:`KeptResults`, it only calls `compute`. Kept results must not be written to.
    """
    if torch.compiler.is_compiling() or _current.results is None:  # torch.compile's policies are per operator
        return compute()
    return _current.results.layers(compute)


def is_keeping() -> bool:
    """Returns whether outputs are kept, and so must not be written to."""
    return not torch.compiler.is_compiling() and _current.results is not None


class KeptResults(TorchDispatchMode):
    """A mode that keeps the results of linear layers and of given operators in a forward pass, for its recomputation.

    Like torch's `create_selective_checkpoint_contexts`, but also for layers as a whole. Each pass needs two, see
    :meth:`pair`.

    Args:
        operators: Operators whose results are kept, unless they are part of a sparse plus low-rank layer.
        results: The kept results, in the order of their computation; shared by the pair.
        recompute: Whether this mode is for the recomputation.
    """

    def __init__(self, operators: Collection[Any], results: deque[Any], *, recompute: bool) -> None:
        super().__init__()
        self._operators, self._results, self._recompute = operators, results, recompute
        self._inside = False
        self._outer: KeptResults | None = None

    @classmethod
    def pair(cls, operators: Collection[Any]) -> tuple[KeptResults, KeptResults]:
        """Returns the modes for a forward pass and its recomputation, as `torch.utils.checkpoint` takes them."""
        results: deque[Any] = deque()
        return cls(operators, results, recompute=False), cls(operators, results, recompute=True)

    def __enter__(self) -> KeptResults:
        self._outer, _current.results = _current.results, self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _current.results = self._outer
        if self._recompute:
            self._results.clear()  # torch stops recomputing once it has what the backward pass needs
        elif self._results:
            self._results.append(_without_outputs(self._results.pop()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside or func not in self._operators:
            return func(*args, **(kwargs or {}))
        return self._keep(func, lambda: (func(*args, **(kwargs or {})), None))[0]

    def layers(self, compute: Callable[[], Computed]) -> Computed:
        """Returns the outputs of linear layers, computed or kept."""
        return self._keep("linear layers", compute)

    def _keep(self, name: Any, compute: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        if self._recompute:
            kept, result = self._results.popleft() if self._results else (None, None)
            if kept != name:
                raise RuntimeError(
                    f"recomputation reached {name} where the forward pass had {kept}: the two must not differ, and "
                    "results are kept for one backward pass only"
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
    """A kept tensor without its graph, which would keep this object alive, and its version."""

    def __init__(self, tensor: Tensor) -> None:
        # As in torch.utils.checkpoint: below autograd, where this mode runs, versions are not shared otherwise.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = tensor._version

    def unchanged(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError("a result kept by activation checkpointing was written to in place")
        return self.tensor

    def without_values(self) -> _Kept:
        """Returns NaN in the same shape, which takes no memory."""
        return _Kept(self.tensor.new_full((), torch.nan).expand(self.tensor.shape))


def _without_outputs(entry: tuple[Any, tuple[Any, Any]]) -> tuple[Any, tuple[Any, Any]]:
    """Drops a decoder layer's last outputs, which are only added to the residual stream and so not read again."""
    name, (outputs, saved) = entry
    return name, (tree_map_only(_Kept, _Kept.without_values, outputs), saved)
