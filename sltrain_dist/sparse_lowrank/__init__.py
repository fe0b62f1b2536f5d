"""Linear layers W = (alpha/r)·BA + S with a fixed sparse support, the core of the paper.

The public names are imported on first use, so that the torch-free modules of this package (sizes, cost) can be imported
where torch is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sltrain_dist.sparse_lowrank.functional import sl_linear
    from sltrain_dist.sparse_lowrank.layer import LowRankLinear, SLLinear
    from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport
    from sltrain_dist.sparse_lowrank.supports.random import RandomSupport
    from sltrain_dist.sparse_lowrank.supports.stratified import StratifiedSupport

__all__ = ["BlockSupport", "LowRankLinear", "RandomSupport", "SLLinear", "StratifiedSupport", "sl_linear"]

_HOME = {
    "sl_linear": "functional",
    "LowRankLinear": "layer",
    "SLLinear": "layer",
    "RandomSupport": "supports.random",
    "StratifiedSupport": "supports.stratified",
    "BlockSupport": "supports.blocks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
