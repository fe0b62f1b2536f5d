"""SLTrain at scale: sparse plus low-rank pretraining of LLaMA models, sharded, resumable, planned.

The public names are imported on first use, so that plans need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sltrain_dist.config.load import load_config
    from sltrain_dist.config.schema import Config
    from sltrain_dist.memory.estimate import estimate as estimate_memory
    from sltrain_dist.memory.result import Estimate
    from sltrain_dist.sparse_lowrank import (
        BlockSupport,
        LowRankLinear,
        RandomSupport,
        SLLinear,
        StratifiedSupport,
        sl_linear,
    )

__version__ = "0.1.0"

__all__ = [
    "BlockSupport",
    "Config",
    "Estimate",
    "LowRankLinear",
    "RandomSupport",
    "SLLinear",
    "StratifiedSupport",
    "estimate_memory",
    "load_config",
    "sl_linear",
]

_HOME = {
    "Config": ("config.schema", "Config"),
    "Estimate": ("memory.result", "Estimate"),
    "estimate_memory": ("memory.estimate", "estimate"),
    "load_config": ("config.load", "load_config"),
}
"""Module and name there of what does not come from sparse_lowrank."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME.get(name, ("sparse_lowrank", name))
    return getattr(import_module(f"{__name__}.{module}"), attribute)
