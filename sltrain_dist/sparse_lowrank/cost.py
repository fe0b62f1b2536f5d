"""The choice of a layer's route (no torch), by a roofline: the time of the kernels that each route runs.

A kernel takes the larger of the times of its arithmetic and of its memory traffic; to this comes the time of its
launch. Sources: the kernels are listed in :mod:`.route_kernels`, the rates in :mod:`.devices`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sltrain_dist.sparse_lowrank.devices import Device
from sltrain_dist.sparse_lowrank.route_kernels import ROUTE_KERNELS, Kernel, LayerShape, RouteKernels

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


def choose_route(shape: LayerShape, tokens: int, *, bits: int, device: Device, path: Path = "auto") -> Route:
    """Returns the fastest route for a layer's forward and backward pass together.

    A forward pass alone takes the same route, because a recomputed activation must not differ from the first one.

    Args:
        shape: Shape of the layer.
        tokens: T, above 0.
        bits: Bits of the type that is computed in.
        device: The device.
        path: The configured path.

    Returns:
        The route; on `path` unless that is auto.
    """
    return route_at(tokens, route_ranges(shape, bits, device, path))


Ranges = tuple[tuple[int, int], ...]
"""Routes by the number of tokens: (smallest number, index in :data:`ROUTES`), the largest number first."""


def route_at(tokens: int, ranges: Ranges) -> Route:
    """Returns the route for a number of tokens. torch.compile traces it: comparisons alone keep T dynamic."""
    return ROUTES[next(route for first, route in ranges if tokens >= first)]


@lru_cache(maxsize=4096)
def route_ranges(shape: LayerShape, bits: int, device: Device, path: Path) -> Ranges:
    """Returns the fastest routes on a path by the number of tokens, with one change at most between powers of two."""

    def fastest(tokens: int) -> int:
        seconds = route_seconds(shape, tokens, bits=bits, device=device)
        return min((i for i, route in enumerate(ROUTES) if path in ("auto", route.path)), key=lambda i: seconds[i])

    ranges = [(1, fastest(1))]
    for low in (1 << power for power in range(_MAX_LOG_TOKENS)):
        if fastest(2 * low) != ranges[0][1]:
            last, first = low, 2 * low  # the last number with the old route, the first with the new one
            while first - last > 1:
                middle = (last + first) // 2
                last, first = (middle, first) if fastest(middle) == ranges[0][1] else (last, middle)
            ranges.insert(0, (first, fastest(2 * low)))
    return tuple(ranges)


_MAX_LOG_TOKENS = 22
"""Up to 2^22 tokens the route may change with their number."""


def route_seconds(shape: LayerShape, tokens: int, *, bits: int, device: Device) -> tuple[float, ...]:
    """Returns the predicted seconds of :data:`ROUTES`, forward and backward. Args as of :func:`choose_route`."""
    kernels = RouteKernels(shape, tokens, bits, device)
    return tuple(kernel_seconds(listed(kernels), bits, device) / shape.sharing for listed in ROUTE_KERNELS)


def kernel_seconds(kernels: Iterable[Kernel], bits: int, device: Device) -> float:
    """Returns the predicted seconds of kernels that run one after another."""
    total = 0.0
    for kernel in kernels:
        rate = device.rate(kernel.unit, bits)
        total += max(kernel.flops / rate.flops, kernel.bytes / rate.bandwidth) + kernel.launches * device.launch_s
    return total
