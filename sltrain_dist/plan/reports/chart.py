"""Layout of the stacked area chart of memory over one update, shared by the HTML page and the plot (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from sltrain_dist.memory.result import Estimate, Group
from sltrain_dist.plan.components import GROUPS, PHASES
from sltrain_dist.plan.planned_run import PlannedRun

_MIN_PHASE_WIDTH = 0.12
"""Smallest width of a phase, as a share of the chart's before all are scaled to fit, so that its name can be read."""


@dataclass(frozen=True)
class PhaseRange:
    """The name of a phase and its horizontal range in the chart, whose width is 1."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class StackedChart:
    """Allocated bytes by group over a timeline, drawn over a width of 1.

    Moments are evenly spaced within a phase: widths are not times.

    Attributes:
        phases: Ranges of the phases, from left to right.
        xs: Positions of the curves' corners, from left to right. Each phase begins and ends with a level piece.
        heights: Bytes at these positions for each group that takes any, in the order of the reports.
        peak_x: Position of the peak.
    """

    phases: Sequence[PhaseRange]
    xs: Sequence[float]
    heights: dict[Group, list[int]]
    peak_x: float

    def areas(self) -> dict[Group, tuple[list[int], list[int]]]:
        """Returns the lower and the upper edge of each group's area, in bytes at `xs`."""
        lower = [0] * len(self.xs)
        areas = {}
        for group, sizes in self.heights.items():
            upper = [low + size for low, size in zip(lower, sizes, strict=True)]
            areas[group] = (lower, upper)
            lower = upper
        return areas


def stacked_chart(estimate: Estimate) -> StackedChart:
    """Lays out the chart of an estimate's timeline."""
    runs = [(phase, list(points)) for phase, points in groupby(estimate.timeline, key=lambda point: point.phase)]
    shares = [max(_MIN_PHASE_WIDTH, len(points) / len(estimate.timeline)) for _, points in runs]
    phases, xs, corners, peak_x = [], [], [], 0.0
    start = 0.0
    for (phase, points), share in zip(runs, shares, strict=True):
        width = share / sum(shares)
        phases.append(PhaseRange(PHASES[phase], start, start + width))
        middles = [start + width * (index + 0.5) / len(points) for index in range(len(points))]
        xs += [start, *middles, start + width]
        corners += [points[0], *points, points[-1]]
        for x, point in zip(middles, points, strict=True):
            peak_x = x if point is estimate.peak else peak_x
        start += width
    sums = [point.groups() for point in corners]
    heights = {group: [each.get(group, 0) for each in sums] for group in GROUPS}
    return StackedChart(phases, xs, {group: sizes for group, sizes in heights.items() if any(sizes)}, peak_x)


def tensor_limit_bytes(planned: PlannedRun) -> int | None:
    """Returns how many bytes the device has for allocated tensors, for a line in the chart.

    None if no device is named, if nothing is left for tensors, or if the line would lie far above the chart.
    """
    if planned.device_memory is None:
        return None
    limit = planned.device_memory - planned.estimate.reserved_bytes
    return limit if 0 < limit <= 2 * planned.estimate.peak_bytes else None


def axis_ticks(top: int) -> list[int]:
    """Returns three to six round numbers of bytes from 0 to at most `top`."""
    power = 10 ** (len(str(max(top, 1))) - 1)
    step = next(step for step in (power // 5, power // 2, power, 2 * power) if top < 6 * max(step, 1))
    return list(range(0, top + 1, max(step, 1)))
