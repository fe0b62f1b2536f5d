"""The choice of a layer's route (no torch) by a small cost model, calibrated by tools/bench_linear.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sltrain_dist.config.schema import ReparamConfig, SupportKind
from sltrain_dist.sparse_lowrank.sizes import nonzeros

Path = Literal["auto", "materialize", "factored"]
"""How W is applied; with auto, :func:`choose_route` decides."""


@dataclass(frozen=True)
class Route:
    """How a layer is applied to a number of tokens.

    Attributes:
        path: materialize or factored.
        dense_backward: In the path materialize, whether the backward pass builds W and the dense gradient. If not, it
            works as in the path factored.
    """

    path: Literal["materialize", "factored"]
    dense_backward: bool


ROUTES = (Route("materialize", True), Route("materialize", False), Route("factored", False))
"""All routes."""


@dataclass(frozen=True)
class Rates:
    """Costs on one kind of device, in units of one multiply-add of a large dense product there.

    Attributes:
        bags: A multiply-add of xSᵀ or gS with scattered positions.
        dots: A multiply-add of dV with scattered positions, without the dense gradient.
        blocks: A multiply-add of the block products.
        transpose: A pass over one element that reads and writes with different strides.
        copy: A pass over one element that keeps its order.
        pick: Gathering one element by its feature, for `blocks`.
        index: One position: computing it, scattering to it or gathering from it.
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
"""Rates by device and bits of the type. cpu: measured (docs/operator.md). cuda: blocks, transpose and copy of 16 bits
and copy of 32 bits are measured on an H200 (docs/reports/2026-11-27-h200.md), where the kernels gather features as they
read; the others are from data sheets: everything but a large dense product is taken to run at the memory's rate."""


class LayerShape(NamedTuple):
    """What a layer's cost depends on: (m, n) of W, the rank, the number of sparse values, and their support."""

    m: int
    n: int
    rank: int
    nnz: int
    support: SupportKind

    @staticmethod
    def of(m: int, n: int, reparam: ReparamConfig) -> LayerShape:
        """Returns the shape of a layer with m outputs and n inputs."""
        return LayerShape(m, n, reparam.rank, nonzeros(m, n, reparam.density, reparam.support), reparam.support)


def choose_route(shape: LayerShape, tokens: int, *, bits: int, device: str, path: Path = "auto") -> Route:
    """Returns the cheapest route for a layer's forward and backward pass together.

    A forward pass alone takes the same route, because a recomputed activation must not differ from the first one.

    Args:
        shape: Shape of the layer.
        tokens: T, above 0.
        bits: Bits of the type that is computed in.
        device: Type of the device, "cpu" or "cuda"; others count as "cuda".
        path: The configured path.

    Returns:
        The route; on `path` unless that is auto.
    """
    best, least = ROUTES[0], math.inf
    for route, cost in zip(ROUTES, route_costs(shape, tokens, bits=bits, device=device), strict=True):
        if path in ("auto", route.path) and cost < least:
            best, least = route, cost
    return best


def route_costs(shape: LayerShape, tokens: int, *, bits: int, device: str) -> tuple[float, float, float]:
    """Returns the costs of :data:`ROUTES`, forward and backward, in multiply-adds of a dense product.

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
    """Returns the costs of `blocks` besides its products, (forward, backward): it gathers or transposes."""
    if device != "cpu":
        return rates.transpose * t * (m + n), rates.transpose * t * (m + 2 * n)
    if bits > 16:
        return rates.pick * t * n, rates.pick * t * n
    return (rates.transpose + rates.pick) * t * n, rates.transpose * t * (m + n) + rates.pick * t * n
