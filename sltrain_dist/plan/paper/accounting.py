"""The memory arithmetic of the paper's Table 2 (arXiv 2406.02214; no torch).

G is 1e9 bytes. Parameters and Adam's two moments take 2 bytes per value, and SLTrain's positions 8 bytes (int64).
Gradients and activations are not counted. Parameters and optimizer states are each rounded to two decimals, and the
printed total is the sum of the rounded numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal, get_args

from sltrain_dist.config.schema import ModelConfig, ReparamConfig
from sltrain_dist.errors import ConfigError
from sltrain_dist.models.count import block_linears, count_parameters

Method = Literal["full", "lowrank", "relora", "galore", "sltrain"]

METHODS: tuple[Method, ...] = get_args(Method)
"""The rows of the table, in its order."""

_VALUE_BYTES = 2
_MOMENTS_BYTES = 4
_INDEX_BYTES = 8


@dataclass(frozen=True)
class PaperMemory:
    """Memory of one method and model, a cell of the table.

    Parameters include SLTrain's positions; the optimizer has Adam's moments and GaLore's projectors.
    """

    method: Method
    parameter_bytes: int
    optimizer_bytes: int

    @property
    def parameter_gb(self) -> Decimal:
        """Parameters in G, rounded as in the table."""
        return _rounded(self.parameter_bytes)

    @property
    def optimizer_gb(self) -> Decimal:
        """Optimizer states in G, rounded as in the table."""
        return _rounded(self.optimizer_bytes)

    @property
    def total_gb(self) -> Decimal:
        """Total in G as in the table, the sum of the two rounded numbers."""
        return self.parameter_gb + self.optimizer_gb


def paper_method(reparam: ReparamConfig) -> Method:
    """Returns the configured method.

    Raises:
        ConfigError: The paper's table does not have it.
    """
    for method in METHODS:
        if method == reparam.method:
            return method
    raise ConfigError(
        f"reparam.method={reparam.method}: the paper's table has {', '.join(METHODS)} only; set one of them, or plan "
        "without --accounting paper"
    )


def paper_memory(model: ModelConfig, reparam: ReparamConfig, method: Method | None = None) -> PaperMemory:
    """Computes the memory that the paper states for a model by `method`, or else by that of `reparam`.

    The support is assumed to be random, as it is in the paper. With the methods that have `reparam.dense_layers`, whose
    weights are not replaced, these belong to the base like the head.

    Raises:
        ConfigError: The paper's table does not have the method of `reparam`.
    """
    method = method or paper_method(reparam)
    if method not in ("sltrain", "lowrank"):
        reparam = reparam.model_copy(update={"dense_layers": ()})
    # All five methods follow from two counts: SLTrain's base, low-rank and sparse parameters, and full-rank parameters.
    parts = count_parameters(model, reparam.model_copy(update={"method": "sltrain", "support": "random"}))
    full = count_parameters(model, reparam.model_copy(update={"method": "full"})).total
    base, low_rank, sparse = parts.remainder + parts.dense, parts.factors, parts.sparse
    if method == "galore":
        linears, layers, rank = block_linears(model), model.num_layers, reparam.rank
        moments = base + layers * sum(rank * max(s.m, s.n) for s in linears)  # of projected gradients
        projectors = layers * sum(rank * min(s.m, s.n) for s in linears)
        return PaperMemory(method, _VALUE_BYTES * full, _MOMENTS_BYTES * moments + _VALUE_BYTES * projectors)
    parameters, trained, index = {
        "full": (full, full, 0),
        "lowrank": (base + low_rank, base + low_rank, 0),
        "relora": (full + base + low_rank, base + low_rank, 0),  # the paper counts base twice
        "sltrain": (base + low_rank + sparse, base + low_rank + sparse, sparse),
    }[method]
    return PaperMemory(method, _VALUE_BYTES * parameters + _INDEX_BYTES * index, _MOMENTS_BYTES * trained)


def paper_table(model: ModelConfig, reparam: ReparamConfig) -> list[PaperMemory]:
    """Computes the memory of all five methods for a model, in the order of the table."""
    return [paper_memory(model, reparam, method) for method in METHODS]


def _rounded(size: int) -> Decimal:
    return (Decimal(size) / 10**9).quantize(Decimal("0.01"), ROUND_HALF_UP)
