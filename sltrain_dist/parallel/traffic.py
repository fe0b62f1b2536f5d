"""What an update sends to other ranks, measured: every collective of torch.distributed is counted as it is called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain_dist.parallel.communication import Traffic

_KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "other",
    "reduce": "other",
    "gather": "other",
    "scatter": "other",
    "alltoall": "other",
    "send": "other",
}
"""Collectives by the beginning of their operator's name, as :class:`Traffic` counts them."""


class TrafficMeter(TorchDispatchMode):
    """Counts the collectives that are called while it is entered, in this process, the backward pass included.

    Attributes:
        traffic: Bytes that this rank sends, under the convention of :class:`Traffic`.
    """

    supports_higher_order_operators = True  # those of compiled blocks pass through like all that is no collective

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes no result, so that torch.compile need not stand aside for it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", None) == "c10d":
            self._count(func._schema.name.removeprefix("c10d::").lstrip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Iterable[Any]) -> None:
        kind = next((kind for beginning, kind in _KINDS.items() if name.startswith(beginning)), None)
        if kind is None:  # barriers and the like
            return
        group: Any = next((argument for argument in args if not isinstance(argument, Tensor | list)), None)
        ranks = ProcessGroup.unbox(group).size()
        sizes = [sum(tensor.nbytes for tensor in _tensors(argument)) for argument in args]
        # The larger of input and output is the whole message, of which every rank has or gets a part.
        self.traffic += Traffic.of(kind, max(sizes), ranks)


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for part in argument for tensor in _tensors(part)] if isinstance(argument, list) else []
