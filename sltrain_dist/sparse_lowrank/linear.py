"""Linear layers that stand in for `nn.Linear`: sparse plus low-rank, and low-rank alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.numerics.keyed import fill_
from sltrain_dist.sparse_lowrank.functional import build_weight, sl_linear
from sltrain_dist.sparse_lowrank.structured import BlockSupport, StratifiedSupport
from sltrain_dist.sparse_lowrank.support import RandomSupport, Support

SUPPORTS: dict[SupportKind, type[RandomSupport | StratifiedSupport | BlockSupport]] = {
    "random": RandomSupport,
    "stratified": StratifiedSupport,
    "blocks": BlockSupport,
}
"""The supports by the name that `reparam.support` uses."""


class SLLinear(nn.Module):
    """A linear layer with the weight W = (alpha/rank)·BA + S (SLTrain, arXiv 2406.02214).

    Args:
        in_features: n.
        out_features: m.
        rank: r; at most min(m, n).
        density: δ, the share of W's entries that S holds.
        alpha: Numerator of the low-rank scale alpha / rank.
        support: How the positions of S are chosen.
        path: How W is applied; "auto" picks the fastest that there is for the support.
        bias: Whether there is a bias, which starts at 0.
        name: The layer's construction name; it keys the support and the initial values.
        seed: Seed of the run.
        device: Where the parameters live. On "meta" nothing is computed until :meth:`reset_parameters`.
        dtype: Type of the parameters.

    Attributes:
        B: (m, r), starts at 0, so that W = S at first.
        A: (r, n), starts from U(±1/√n).
        V: Values of S, shape `support.values_shape`, start from U(±1/√n).

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float,
        alpha: float,
        *,
        support: SupportKind = "random",
        path: Literal["auto", "materialize"] = "auto",
        bias: bool = False,
        name: str = "",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_rank(rank, out_features, in_features)
        if support not in SUPPORTS:
            raise ValueError(f"support = {support!r}; there are: {', '.join(map(repr, SUPPORTS))}")
        if path not in ("auto", "materialize"):
            raise ValueError(f"path = {path!r}; there are: 'auto', 'materialize'")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.density, self.alpha, self.path = rank, density, alpha, path
        self.name, self.seed = name, seed
        self.support: Support = SUPPORTS[support](
            out_features, in_features, density, seed=seed, name=name, device=device
        )
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(self.support.values_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if not self.B.is_meta:
            self.reset_parameters()

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def reset_parameters(self) -> None:
        """Sets the support and the initial values, in place, keyed by (seed, name)."""
        bound = 1 / math.sqrt(self.in_features)
        self.support.reset()
        with torch.no_grad():
            self.B.zero_()
            fill_(self.A, self.seed, f"{self.name}.A", uniform=bound)
            fill_(self.V, self.seed, f"{self.name}.V", uniform=bound)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        return sl_linear(x, self.B, self.A, self.V, self.support, self.scale, self.bias)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W as a new (m, n) tensor of the parameters' type."""
        positions = self.support.row_positions(0, self.out_features)
        return build_weight(self.B, self.A, self.V, positions, self.scale, self.B.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"density={self.density}, alpha={self.alpha}, path={self.path}, bias={self.bias is not None}"
        )


class LowRankLinear(nn.Module):
    """A linear layer with the weight W = (alpha/rank)·BA alone, the paper's low-rank baseline.

    Here B cannot start at 0: with W = 0 in every layer, attention and MLP would pass neither signal nor
    gradient to each other. B starts uniform with the variance that gives W's entries 1/(3n), the variance
    of U(±1/√n), which is what S gives SLTrain's W (per non-zero).

    Args and attributes as of :class:`SLLinear`, without S.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        name: str = "",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_rank(rank, out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.name, self.seed = rank, alpha, name, seed
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        if not self.B.is_meta:
            self.reset_parameters()

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def reset_parameters(self) -> None:
        """Sets the initial values, in place, keyed by (seed, name)."""
        with torch.no_grad():
            fill_(self.A, self.seed, f"{self.name}.A", uniform=1 / math.sqrt(self.in_features))
            # var(W) = s²·r·var(B)·var(A) = 1/(3n) with var(A) = 1/(3n) asks for var(B) = 1/(s²·r).
            fill_(self.B, self.seed, f"{self.name}.B", uniform=math.sqrt(3 / self.rank) / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W as a new (m, n) tensor of the parameters' type."""
        return (self.B @ self.A).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, alpha={self.alpha}"


def _check_rank(rank: int, m: int, n: int) -> None:
    if m < 1 or n < 1:
        raise ValueError(f"out_features = {m} and in_features = {n} must be positive")
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank = {rank} is outside 1 … min(out_features, in_features) = {min(m, n)}")
