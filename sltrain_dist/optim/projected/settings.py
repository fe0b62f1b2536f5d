"""Settings of the optimizer with a projected gradient, and the shapes that follow from them (no torch)."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, TypeGuard

from sltrain_dist.config.schema import PROJECTED_METHODS, Config, Memory, OptimConfig, ReparamConfig
from sltrain_dist.models.count import is_factor

PROJECTION = "projection"
"""Name of GaLore's state that holds the projection."""

NORM = "norm"
"""Name of APOLLO's state that holds the norm of the last change, which limits the next one."""

_SCALES = {"galore": 0.25, "apollo": 1.0, "apollo-mini": 128.0}
"""`optim.projection_scale` of the published pretraining, by method."""

Shape = tuple[int, ...]


class ProjectedOptim(OptimConfig):
    """The section `optim`, with what `reparam.method` says about the projection of gradients."""

    method: Memory[Literal["galore", "apollo", "apollo-mini"]]
    """How gradients are projected, and how the moments of the projected gradients are used."""
    rank: Memory[int]
    """Rank of the projected gradients: `reparam.rank`, or 1 with apollo-mini."""
    seed: int = 0
    """Seed of the random projections of apollo and apollo-mini."""

    @property
    def scale(self) -> float:
        """Scale of the change, with the default resolved."""
        return _SCALES[self.method] if self.projection_scale is None else self.projection_scale


def optimizer_settings(config: Config) -> OptimConfig:
    """Returns the settings of a run's optimizer: `optim`, as :class:`ProjectedOptim` if gradients are projected."""
    if config.reparam.method not in PROJECTED_METHODS:
        return config.optim
    return _projected(config.optim, config.reparam, config.seed)


@lru_cache(64)
def _projected(optim: OptimConfig, reparam: ReparamConfig, seed: int) -> ProjectedOptim:
    rank = 1 if reparam.method == "apollo-mini" else reparam.rank
    return ProjectedOptim.model_validate({**optim.model_dump(), "method": reparam.method, "rank": rank, "seed": seed})


def projects(optim: OptimConfig, name: str) -> TypeGuard[ProjectedOptim]:
    """Returns whether the gradient of a named parameter is projected."""
    return isinstance(optim, ProjectedOptim) and is_factor(name)


def low_shape(shape: Shape, rank: int) -> Shape:
    """Returns the shape of the projected gradient of an (m, n) matrix: (m, r) if m ≥ n, else (r, n)."""
    m, n = shape
    return (m, rank) if m >= n else (rank, n)


def projection_shape(shape: Shape, rank: int) -> Shape:
    """Returns the shape of the projection of an (m, n) matrix: (r, n) if m ≥ n, else (m, r)."""
    m, n = shape
    return (rank, n) if m >= n else (m, rank)
