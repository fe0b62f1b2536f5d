"""Which route a layer takes (no torch): a small cost model, calibrated by tools/bench_linear.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sltrain_dist.config.schema import ReparamConfig, SupportKind
from sltrain_dist.sparse_lowrank.sizes import nonzeros

Path = Literal["auto", "materialize", "factored"]
"""How W is applied; auto leaves it to :func:`choose_route`."""


@dataclass(frozen=True)
class Route:
    """How a layer is applied to a number of tokens.

    Attributes:
        path: materialize or factored.
        dense_backward: In the path materialize, whether the backward pass builds W and the dense gradient.
            Else it does as the path factored.
    """

    path: Literal["materialize", "factored"]
    dense_backward: bool


ROUTES = (Route("materialize", True), Route("materialize", False), Route("factored", False))
"""All there are."""


@dataclass(frozen=True)
class Rates:
    """Costs on one kind of device, in units of one multiply-add of a large dense product there.

    Attributes:
        bags: A multiply-add of xSᵀ or gS for scattered positions.
        dots: A multiply-add of dV for scattered positions, without the dense gradient.
        blocks: A multiply-add of the block products.
        transpose: Going over one element, reading and writing with different strides.
        copy: Going over one element as it lies.
        pick: Choosing one element by its feature, where `blocks` does.
        index: One position: to compute, scatter to or gather from it.
    """

    bags: float
    dots: float
    blocks: float
    transpose: float
    copy: float
    pick: float
    index: float


RATES: dict[tuple[str, int], Rates] = {
    ("cpu", 32): Rates(bags=5, dots=10, blocks=2, transpose=110, copy=15, pick=43, index=500),
    ("cpu", 16): Rates(bags=2, dots=8, blocks=1.2, transpose=80, copy=9, pick=7, index=250),
    ("cuda", 32): Rates(bags=200, dots=400, blocks=4, transpose=52, copy=48, pick=0, index=1500),
    ("cuda", 16): Rates(bags=1000, dots=2000, blocks=7, transpose=410, copy=380, pick=0, index=6000),
}
"""By device and bits of the type. cpu: measured (docs/operator.md). cuda: of 16 bits blocks, transpose and copy, and
of 32 bits copy, measured on an H200 (docs/reports/2026-11-27-h200.md), where the kernels pick features as they read;
the others from data sheets, that everything but a large dense product runs at the memory's rate."""


class LayerShape(NamedTuple):
    """What the cost of a layer depends on: (m, n) of W, the rank, and the number of sparse values and their support."""

    m: int
    n: int
    rank: int
    nnz: int
    support: SupportKind

    @staticmethod
    def of(m: int, n: int, reparam: ReparamConfig) -> LayerShape:
        """The shape of a layer of m outputs and n inputs."""
        return LayerShape(m, n, reparam.rank, nonzeros(m, n, reparam.density, reparam.support), reparam.support)


def choose_route(shape: LayerShape, tokens: int, *, bits: int, device: str, path: Path = "auto") -> Route:
    """The cheapest way to apply a layer forward and backward.

    The same for a forward pass alone: a recomputed activation must not differ from the first one.

    Args:
        shape: Of the layer.
        tokens: T, above 0.
        bits: Of the type that is computed in.
        device: Its type, "cpu" or "cuda"; another counts as the latter.
        path: What the configuration asks for.

    Returns:
        The route; on `path` where that is not auto.
    """
    best, least = ROUTES[0], math.inf
    for route, cost in zip(ROUTES, route_costs(shape, tokens, bits=bits, device=device), strict=True):
        if path in ("auto", route.path) and cost < least:
            best, least = route, cost
    return best


def route_costs(shape: LayerShape, tokens: int, *, bits: int, device: str) -> tuple[float, float, float]:
    """Costs of :data:`ROUTES`, forward and backward, in multiply-adds of a dense product.

    A dense layer costs 3·T·m·n. Args as of :func:`choose_route`.
    """
    m, n, r, nnz, support = shape
    rates = RATES["cpu" if device == "cpu" else "cuda", 16 if bits <= 16 else 32]
    t = tokens
    dense, weight = t * m * n, m * n * r
    build = weight + rates.copy * m * n + rates.index * nnz
    if support == "blocks":
        product = sample = rates.blocks * t * nnz
        arrange_forward, arrange_backward = _block_arrangement(m, n, t, rates, bits=bits, device=device)
    else:
        product, sample = rates.bags * t * nnz, rates.dots * t * nnz
        arrange_forward = rates.index * nnz + rates.transpose * t * (m + n)
        arrange_backward = 2 * rates.index * nnz + rates.transpose * t * (m + 2 * n)
    sparse_forward = product + arrange_forward
    sparse_backward = product + sample + arrange_backward
    low_rank = t * r * (m + n)
    factored_backward = 2 * low_rank + sparse_backward
    return (
        3 * dense + 2 * build + 2 * weight + rates.index * nnz,
        dense + build + t * r * n + factored_backward,
        low_rank + sparse_forward + factored_backward,
    )


def _block_arrangement(m: int, n: int, t: int, rates: Rates, *, bits: int, device: str) -> tuple[float, float]:
    """What `blocks` does beside its products, forward and backward: x, y, g and dx are picked or transposed."""
    if device != "cpu":
        return rates.transpose * t * (m + n), rates.transpose * t * (m + 2 * n)
    if bits > 16:
        return rates.pick * t * n, rates.pick * t * n
    return (rates.transpose + rates.pick) * t * n, rates.transpose * t * (m + n) + rates.pick * t * n
