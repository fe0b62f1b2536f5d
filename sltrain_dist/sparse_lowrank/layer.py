"""Linear layers that replace `nn.Linear`: sparse plus low-rank, and low-rank alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.numerics.int8_weight import plain
from sltrain_dist.numerics.keyed import Initial, draw_seed
from sltrain_dist.sparse_lowrank.convert import fit
from sltrain_dist.sparse_lowrank.cost import Path
from sltrain_dist.sparse_lowrank.functional import Operand, sl_linear_shared
from sltrain_dist.sparse_lowrank.paths.materialize import build_rows
from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport
from sltrain_dist.sparse_lowrank.supports.random import RandomSupport
from sltrain_dist.sparse_lowrank.supports.stratified import StratifiedSupport
from sltrain_dist.sparse_lowrank.supports.support import Support

SUPPORTS: dict[SupportKind, type[RandomSupport | StratifiedSupport | BlockSupport]] = {
    "random": RandomSupport,
    "stratified": StratifiedSupport,
    "blocks": BlockSupport,
}
"""The classes of supports, by the name that `reparam.support` uses."""


class SLLinear(nn.Module):
    """A linear layer with the weight W = (alpha/rank)·BA + S (SLTrain, arXiv 2406.02214).

    A state dict holds B, A, V, the bias, and in 24 bytes the key and fingerprint of the positions of S. A layer without
    a seed adopts the key of a state dict; one with a seed refuses a state dict of other positions.

    Args:
        in_features: n.
        out_features: m.
        rank: r; at most min(m, n).
        density: δ, the share of W's entries that S holds.
        alpha: Numerator of the low-rank scale alpha / rank.
        support: How the positions of S are chosen.
        path: How W is applied: "materialize" builds it, "factored" never does, "auto" picks the faster for the given
            number of tokens, by a cost model.
        row_block_bytes: Most bytes of W, or of its gradient, that "materialize" forms at a time. None: all.
        bias: Whether there is a bias, which starts at 0.
        name: The layer's construction name; with a seed, it keys the support and the initial values. Layers of one seed
            with the support `blocks`, whose names differ only in the last part, such as "attn.q" and "attn.k", share
            the permutation of their inputs.
        seed: Makes the support and the initial values functions of (seed, name), for exact reproduction. None: they are
            drawn from torch's default generator, as `nn.Linear`'s are, so that layers differ, and `torch.manual_seed`
            repeats them. All processes that train one model must then set the same torch seed.
        device: Device of the parameters. On "meta", nothing is drawn or computed until :meth:`reset_parameters`, or
            until a state dict is loaded.
        dtype: Type of the parameters.

    Attributes:
        B: (m, r), starts at 0, so that W = S at first.
        A: (r, n), starts from U(±1/√n).
        V: Values of S, shape `support.values_shape`, start from U(±1/√n).

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: On use, after `to_empty` without `reset_parameters` or a state dict, if the seed is None.
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
        path: Path = "auto",
        row_block_bytes: int | None = None,
        bias: bool = False,
        name: str = "",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, out_features, in_features)
        if support not in SUPPORTS:
            raise ValueError(f"support = {support!r} is unknown; use one of {', '.join(map(repr, SUPPORTS))}")
        if path not in ("auto", "materialize", "factored"):
            raise ValueError(f"path = {path!r} is unknown; use one of 'auto', 'materialize', 'factored'")
        if row_block_bytes is not None and row_block_bytes < 1:
            raise ValueError(f"row_block_bytes = {row_block_bytes} must be positive, or None")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.density, self.alpha, self.path = rank, density, alpha, path
        self.name, self.seed, self.row_block_bytes = name, seed, row_block_bytes
        self.support: Support = SUPPORTS[support](
            out_features, in_features, density, seed=seed, name=name, device=device
        )
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(self.support.values_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if not self.B.is_meta:
            self._reset_values()

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def reset_parameters(self) -> None:
        """Sets the initial values in place, by (seed, name); without a seed, draws new values and positions."""
        if self.seed is None:
            self.support.reset()  # with a seed, the positions never change
        self._reset_values()

    def initial_values(self) -> dict[str, Initial]:
        """Returns how each parameter is initialised, by (seed, name); a seed of None is drawn anew."""
        bound = 1 / math.sqrt(self.in_features)
        seed = draw_seed() if self.seed is None else self.seed
        values = {
            "B": Initial.constant(0.0),
            "A": Initial.uniform(bound, seed, f"{self.name}.A"),
            "V": Initial.uniform(bound, seed, f"{self.name}.V"),
        }
        return values if self.bias is None else {**values, "bias": Initial.constant(0.0)}

    def _reset_values(self) -> None:
        for name, initial in self.initial_values().items():
            initial.fill_(getattr(self, name))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        error_msgs = args[-1]
        key = f"{prefix}support._extra_state"
        if self.seed is None and f"{prefix}V" in state_dict and key not in state_dict:
            error_msgs.append(
                f"{prefix}V: the state dict has values but not the key of their positions, {key}; create the layer "
                "with the name and the seed of the saved one, and load with strict=False"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        device = self.V.device
        if device != next(self.support.buffers()).device:  # assign=True replaced the parameters on the meta device
            self.support.to_empty(device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        return sl_linear_shared(x, [self.operand()])[0]

    def operand(self) -> Operand:
        """Returns the layer's argument for :func:`sl_linear_shared`."""
        return Operand(self.B, self.A, self.V, self.support, self.scale, self.bias, self.path, self.row_block_bytes)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Returns W as a new (m, n) tensor of the parameters' type."""
        self.support.check_filled()
        B, A, V = (plain(parameter, parameter.dtype) for parameter in (self.B, self.A, self.V))
        return build_rows(B, A, V, self.support, self.scale, B.dtype, 0, self.out_features)

    def merge_to_linear(self) -> nn.Linear:
        """Returns a dense layer that computes the same, of the parameters' type and on their device."""
        B = self.B
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=B.dtype
        ).to_empty(device=B.device)
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        rank: int,
        density: float,
        alpha: float,
        *,
        bias: Tensor | None = None,
        support: SupportKind = "random",
        path: Path = "auto",
        name: str = "",
        seed: int | None = None,
        sweeps: int = 1,
    ) -> SLLinear:
        """Returns a layer whose W approximates a dense weight; see :func:`sltrain_dist.sparse_lowrank.convert.fit`.

        Args:
            weight: (m, n); its type and device become the layer's.
            rank: r.
            density: δ.
            alpha: Numerator of the low-rank scale.
            bias: (m,) or None.
            support: How the positions of S are chosen.
            path: How W is applied.
            name: Keys the support, with a seed.
            seed: As of :class:`SLLinear`.
            sweeps: Number of alternations between the low-rank and the sparse part.

        Raises:
            ValueError: An argument is out of range.
        """
        m, n = weight.shape
        layer = cls(
            n, m, rank, density, alpha, support=support, path=path, bias=bias is not None,
            name=name, seed=seed, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        B, A, V = fit(weight, rank, layer.scale, layer.support, sweeps)
        with torch.no_grad():
            layer.B.copy_(B)
            layer.A.copy_(A)
            layer.V.copy_(V)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"density={self.density}, alpha={self.alpha}, path={self.path}, bias={self.bias is not None}"
        )


def apply_shared(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Applies layers to one input; sparse plus low-rank layers share work on it, see :func:`sl_linear_shared`."""
    if all(isinstance(layer, SLLinear) for layer in layers):
        return sl_linear_shared(x, [cast(SLLinear, layer).operand() for layer in layers])
    return [layer(x) for layer in layers]


class FactorLayer(nn.Module):
    """Base of layers whose only low-rank part is a pair of factors, without a sparse matrix beside them.

    A subclass sets its other attributes and parameters, then calls :meth:`_make_factors`, and says by
    :meth:`initial_values` how its parameters start.

    Args: as of :class:`SLLinear`.

    Attributes:
        B: (m, r).
        A: (r, n).

    Raises:
        ValueError: An argument is out of range.
    """

    B: nn.Parameter
    A: nn.Parameter

    def __init__(self, in_features: int, out_features: int, rank: int, *, name: str, seed: int | None) -> None:
        super().__init__()
        check_rank(rank, out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.name, self.seed = rank, name, seed

    def _make_factors(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Adds B and A, and sets the initial values of all parameters, unless they are on the meta device."""
        self.B = nn.Parameter(torch.empty(self.out_features, self.rank, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(self.rank, self.in_features, device=device, dtype=dtype))
        if not self.B.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the initial values in place, by (seed, name); without a seed, draws new ones."""
        for name, initial in self.initial_values().items():
            initial.fill_(getattr(self, name))

    def initial_values(self) -> dict[str, Initial]:
        """Returns how each parameter is initialised, by (seed, name); a seed of None is drawn anew."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(FactorLayer):
    """A linear layer with the weight W = (alpha/rank)·BA alone, the paper's low-rank baseline.

    Here B cannot start at 0: with W = 0 in every layer, attention and MLP would pass neither signal nor gradient to
    each other. B starts uniform, with the variance that gives W's entries 1/(3n), the variance of U(±1/√n), which S
    gives to W (per non-zero) in SLTrain.

    Args and attributes as of :class:`SLLinear`, without those of S.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        name: str = "",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, name=name, seed=seed)
        self.alpha = alpha
        self._make_factors(device, dtype)

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def initial_values(self) -> dict[str, Initial]:
        """Returns how each parameter is initialised, by (seed, name); a seed of None is drawn anew."""
        seed = draw_seed() if self.seed is None else self.seed
        return {
            "A": Initial.uniform(1 / math.sqrt(self.in_features), seed, f"{self.name}.A"),
            # var(W) = s²·r·var(B)·var(A) = 1/(3n) with var(A) = 1/(3n) requires var(B) = 1/(s²·r).
            "B": Initial.uniform(math.sqrt(3 / self.rank) / self.scale, seed, f"{self.name}.B"),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Returns W as a new (m, n) tensor of the parameters' type."""
        return (self.B @ self.A).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"


def check_rank(rank: int, m: int, n: int) -> None:
    """Raises ValueError for a rank that an (m, n) matrix cannot have."""
    if m < 1 or n < 1:
        raise ValueError(f"out_features = {m} and in_features = {n} must be positive")
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank = {rank} is outside 1 … min(out_features, in_features) = {min(m, n)}")
