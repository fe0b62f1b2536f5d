"""Measurement of what an update sends to other ranks, by counting the collectives of torch.distributed."""

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
"""Field of :class:`Traffic` by prefix of a collective's operator name."""


class TrafficMeter(TorchDispatchMode):
    """A context manager that counts the collectives of this process, including those in backward passes.

    Attributes:
        traffic: Bytes that this rank sends, counted as by :class:`Traffic`.
    """

    supports_higher_order_operators = True  # those of compiled layers pass through

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether torch.compile may compile under this mode: it may, since the mode changes no result."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", None) == "c10d":
            self._count(func._schema.name.removeprefix("c10d::").lstrip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Iterable[Any]) -> None:
        kind = next((kind for prefix, kind in _KINDS.items() if name.startswith(prefix)), None)
        if kind is None:  # such as barriers
            return
        group: Any = next((argument for argument in args if not isinstance(argument, Tensor | list)), None)
        ranks = ProcessGroup.unbox(group).size()
        sizes = [sum(tensor.nbytes for tensor in _tensors(argument)) for argument in args]
        # The larger one of input and output is the whole message, of which every rank has or receives a part.
        self.traffic += Traffic.of(kind, max(sizes), ranks)


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for part in argument for tensor in _tensors(part)] if isinstance(argument, list) else []
