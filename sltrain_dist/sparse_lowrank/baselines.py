"""Linear layers of published methods that SLTrain is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltrain_dist.numerics.keyed import Initial, draw_seed
from sltrain_dist.sparse_lowrank.layer import check_rank


class ColaLinear(nn.Module):
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
        super().__init__()
        check_rank(rank, out_features, in_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.name, self.seed = name, seed
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        if not self.B.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the initial values in place, by (seed, name); without a seed, draws new ones."""
        for name, initial in self.initial_values().items():
            initial.fill_(getattr(self, name))

    def initial_values(self) -> dict[str, Initial]:
        """Returns how each parameter is initialised, by (seed, name); a seed of None is drawn anew."""
        seed = draw_seed() if self.seed is None else self.seed
        std = (self.rank * (self.in_features + self.out_features)) ** -0.25
        return {key: Initial.normal(std, seed, f"{self.name}.{key}") for key in "AB"}

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        return F.linear(F.silu(F.linear(x, self.A)), self.B)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
