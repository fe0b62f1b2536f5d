"""A count of the matrix products that code runs."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """Counts operators that multiply matrices."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].rstrip("_")
        self.calls += name in ("mm", "addmm", "bmm", "baddbmm", "_embedding_bag", "_embedding_bag_forward_only")
        return func(*args, **(kwargs or {}))
