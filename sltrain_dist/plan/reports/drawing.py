"""How a timeline is drawn (no torch): where moments lie, and what is stacked on what, for page and picture alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from sltrain_dist.memory.result import Estimate, Group, Phase
from sltrain_dist.plan.answer import Answer
from sltrain_dist.plan.reports.labels import GROUPS, PHASES

_NARROWEST = 0.12
"""Share of the width that every phase has at least, so that its name can be read."""


@dataclass(frozen=True)
class Stretch:
    """A phase's part of the width: name, and its ends from 0 to 1."""

    phase: Phase
    start: float
    end: float

    @property
    def name(self) -> str:
        """What people call it."""
        return PHASES[self.phase]


@dataclass(frozen=True)
class Drawing:
    """A timeline as curves over a width of 1. Moments are evenly spaced within a phase: widths are not times.

    Attributes:
        stretches: Phases from left to right.
        xs: Where curves have their corners; phases begin and end with a level stretch.
        heights: Bytes at these by group, those that are there at all, in the order of the reports.
        peak_x: Where the peak is.
    """

    stretches: Sequence[Stretch]
    xs: Sequence[float]
    heights: dict[Group, list[int]]
    peak_x: float

    def stacked(self) -> dict[Group, tuple[list[int], list[int]]]:
        """(lower, upper) edge of each group's area."""
        below = [0] * len(self.xs)
        areas = {}
        for group, sizes in self.heights.items():
            above = [low + size for low, size in zip(below, sizes, strict=True)]
            areas[group] = (below, above)
            below = above
        return areas


def draw(estimate: Estimate) -> Drawing:
    """Lays a timeline out."""
    runs = [(phase, list(points)) for phase, points in groupby(estimate.timeline, key=lambda point: point.phase)]
    shares = [max(_NARROWEST, len(points) / len(estimate.timeline)) for _, points in runs]
    stretches, xs, corners, peak_x = [], [], [], 0.0
    start = 0.0
    for (phase, points), share in zip(runs, shares, strict=True):
        width = share / sum(shares)
        stretches.append(Stretch(phase, start, start + width))
        middles = [start + width * (index + 0.5) / len(points) for index in range(len(points))]
        xs += [start, *middles, start + width]
        corners += [points[0], *points, points[-1]]
        for x, point in zip(middles, points, strict=True):
            peak_x = x if point is estimate.peak else peak_x
        start += width
    sums = [point.groups() for point in corners]
    heights = {group: [each.get(group, 0) for each in sums] for group in GROUPS}
    return Drawing(stretches, xs, {group: sizes for group, sizes in heights.items() if any(sizes)}, peak_x)


def allocatable(known: Answer) -> int | None:
    """What the device leaves to allocated tensors; None without one, or where it is far above what is drawn."""
    if known.device_memory is None:
        return None
    left = known.device_memory - known.estimate.reserved_bytes
    return left if 0 < left <= 2 * known.estimate.peak_bytes else None


def ticks(top: int) -> list[int]:
    """Three to six round numbers of bytes from 0 to at most `top`."""
    power = 10 ** (len(str(max(top, 1))) - 1)
    step = next(step for step in (power // 5, power // 2, power, 2 * power) if top < 6 * max(step, 1))
    return list(range(0, top + 1, max(step, 1)))
