"""Linear layers of published methods that SLTrain is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltrain_dist.numerics.keyed import Initial, draw_seed
from sltrain_dist.sparse_lowrank.layer import FactorLayer


class ColaLinear(FactorLayer):
    """A layer that computes B·SiLU(A·x), two factors with an activation between them (CoLA, arXiv 2502.10940).

    The published `ColaLayer` (github.com/alvin-zyl/CoLA) stores Aᵀ and Bᵀ, with the same arithmetic. There is no scale.
    The function is not linear in x, so that the layer has no weight W that it could be merged into.

    Args:
        in_features: n.
        out_features: m.
        rank: r, the number of activations; at most min(m, n).
        name: Keys the initial values, with `seed`.
        seed: Makes the initial values functions of (seed, name). None: they are drawn from torch's default generator.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        B: (m, r), starts from N(0, 1/√(r·(m + n))), as published.
        A: (r, n), starts from the same distribution.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        name: str = "",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, name=name, seed=seed)
        self._make_factors(device, dtype)

    def initial_values(self) -> dict[str, Initial]:
        """Returns how each parameter is initialised, by (seed, name); a seed of None is drawn anew."""
        seed = draw_seed() if self.seed is None else self.seed
        std = (self.rank * (self.in_features + self.out_features)) ** -0.25
        return {key: Initial.normal(std, seed, f"{self.name}.{key}") for key in "AB"}

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        return F.linear(F.silu(F.linear(x, self.A)), self.B)


class ReloraLinear(FactorLayer):
    """A layer with a frozen dense weight and low-rank factors, W + (alpha/rank)·BA (ReLoRA, arXiv 2307.05695).

    A restart adds the product to W, and draws A anew, see :func:`merge`. The published layer is `ReLoRaLinear`
    (github.com/Guitaricet/relora). What differs: its pretraining has a dropout of 0.1 before A; and there, A is 0
    like B until the first merge, so that neither of them has a gradient before it.

    Args:
        in_features: n.
        out_features: m.
        rank: r; at most min(m, n).
        alpha: Numerator of the low-rank scale alpha / rank.
        std: Standard deviation of the initial W.
        name: Keys the initial values, with `seed`.
        seed: Makes the initial values functions of (seed, name). None: they are drawn from torch's default generator.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        weight: W, (m, n), starts from N(0, std²). It has no gradient.
        B: (m, r), starts at 0.
        A: (r, n), starts from U(±1/√n), which is Kaiming's uniform distribution with a = √5, as published.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        std: float,
        name: str = "",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, name=name, seed=seed)
        self.alpha, self.std = alpha, std
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._make_factors(device, dtype)

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def initial_values(self) -> dict[str, Initial]:
        """Returns how each parameter is initialised, by (seed, name); a seed of None is drawn anew."""
        seed = draw_seed() if self.seed is None else self.seed
        return {
            "weight": Initial.normal(self.std, seed, f"{self.name}.weight"),
            "B": Initial.constant(0.0),
            "A": initial_A(self.in_features, seed, self.name),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        low_rank = F.linear(F.linear(x, self.A), self.B)
        return torch.add(F.linear(x, self.weight), low_rank, alpha=self.scale)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Returns W + s·BA as a new (m, n) tensor of the parameters' type."""
        return merge(self.weight, self.B, self.A, self.scale)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"


def initial_A(in_features: int, seed: int, name: str, merges: int = 0) -> Initial:
    """Returns how relora's A is initialised, at the start and after each of its merges.

    Args:
        in_features: n.
        seed: Keys the values, with the two others.
        name: Name of the layer.
        merges: Number of merges so far.
    """
    return Initial.uniform(1 / math.sqrt(in_features), seed, f"{name}.A" + (f".{merges}" if merges else ""))


def merge(W: Tensor, B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns relora's parameters after a merge, W + scale·BA, 0 and A, which is then drawn anew."""
    return torch.addmm(W, B, A, alpha=scale), torch.zeros_like(B), A
