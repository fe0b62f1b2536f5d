"""The memory arithmetic of the paper's Table 2 (arXiv 2406.02214; no torch).

G is 1e9 bytes. Parameters and Adam's two moments take 2 bytes a value, SLTrain's positions 8 (int64). Gradients and
activations do not count. Parameters and states are each rounded to two decimals, and the printed total is the sum of
the rounded numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

from sltrain_dist.config.schema import ModelConfig, ReparamConfig
from sltrain_dist.models.count import block_linears, count_parameters

Method = Literal["full", "lowrank", "relora", "galore", "sltrain"]

METHODS: tuple[Method, ...] = ("full", "lowrank", "relora", "galore", "sltrain")
"""The rows of the table, in its order."""

_VALUE_BYTES = 2
_MOMENTS_BYTES = 4
_INDEX_BYTES = 8


@dataclass(frozen=True)
class PaperMemory:
    """A cell of the table.

    Attributes:
        method: Row.
        parameter_bytes: Parameters, and positions.
        optimizer_bytes: Adam's moments, and GaLore's projectors.
    """

    method: Method
    parameter_bytes: int
    optimizer_bytes: int

    @property
    def parameter_gb(self) -> Decimal:
        """In G, rounded as printed."""
        return _rounded(self.parameter_bytes)

    @property
    def optimizer_gb(self) -> Decimal:
        """In G, rounded as printed."""
        return _rounded(self.optimizer_bytes)

    @property
    def total_gb(self) -> Decimal:
        """What the table prints: the sum of the rounded parts."""
        return self.parameter_gb + self.optimizer_gb


def paper_memory(model: ModelConfig, reparam: ReparamConfig, method: Method | None = None) -> PaperMemory:
    """The paper's figures for a model.

    Args:
        model: Its shape.
        reparam: Rank and density. The support is taken to be random, as it is in the paper.
        method: One of the five; None for that of `reparam`.
    """
    method = method or reparam.method
    # All five from the parts of two counts: base, LR and SP of SLTrain, and F of full rank.
    parts = count_parameters(model, reparam.model_copy(update={"method": "sltrain", "support": "random"}))
    full = count_parameters(model, reparam.model_copy(update={"method": "full"})).total
    base, low_rank, sparse = parts.remainder, parts.factors, parts.sparse
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
    """All five methods."""
    return [paper_memory(model, reparam, method) for method in METHODS]


def _rounded(size: int) -> Decimal:
    return (Decimal(size) / 10**9).quantize(Decimal("0.01"), ROUND_HALF_UP)
