"""The stacked area chart of memory over one update: its layout, for the HTML page too, and the plot (no torch)."""

from __future__ import annotations

from io import BytesIO
from itertools import groupby
from typing import NamedTuple

from sltrain_dist.memory.result import Estimate, Group
from sltrain_dist.plan.components import GROUPS, PHASES, table_unit
from sltrain_dist.plan.planned_run import PlannedRun
from sltrain_dist.plan.reports.sentences import describe_run, fact_sentences, format_size

_MIN_PHASE_WIDTH = 0.12
"""Smallest width of a phase, as a share of the chart's before all are scaled to fit, so that its name can be read."""


class StackedChart(NamedTuple):
    """Allocated bytes by group over a timeline, drawn over a width of 1.

    Moments are evenly spaced within a phase: widths are not times.
    """

    phases: list[tuple[str, float, float]]
    """Name of each phase, and where it begins and ends."""
    xs: list[float]
    """Positions of the curves' corners, from left to right. Each phase begins and ends with a level piece."""
    heights: dict[Group, list[int]]
    """Bytes at these positions for each group that takes any, in the order of the reports."""
    peak_x: float
    """Position of the peak."""


def stacked_chart(estimate: Estimate) -> StackedChart:
    """Lays out the chart of an estimate's timeline."""
    runs = [(phase, list(points)) for phase, points in groupby(estimate.timeline, key=lambda point: point.phase)]
    shares = [max(_MIN_PHASE_WIDTH, len(points) / len(estimate.timeline)) for _, points in runs]
    phases, positions, xs, corners, start = [], [], [], [], 0.0
    for (phase, points), share in zip(runs, shares, strict=True):
        width = share / sum(shares)
        phases.append((PHASES[phase], start, start + width))
        middles = [start + width * (index + 0.5) / len(points) for index in range(len(points))]
        positions += middles
        xs += [start, *middles, start + width]
        corners += [point.groups() for point in (points[0], *points, points[-1])]
        start += width
    heights = {group: [sums.get(group, 0) for sums in corners] for group in GROUPS}
    heights = {group: sizes for group, sizes in heights.items() if any(sizes)}
    return StackedChart(phases, xs, heights, peak_x=positions[estimate.timeline.index(estimate.peak)])


def tensor_limit_bytes(planned: PlannedRun) -> int | None:
    """Returns the bytes that the device has for allocated tensors, to draw as a line in the chart.

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


def draw_plot(planned: PlannedRun, file_format: str) -> bytes:
    """Draws allocated memory over one update, stacked by group, and returns the file (png, svg or pdf)."""
    from matplotlib.figure import Figure  # slow to import, and not needed for the page

    estimate = planned.estimate
    chart, unit, at_peak = stacked_chart(estimate), table_unit(estimate), estimate.peak.groups()
    # A Figure of its own, because pyplot's would choose a backend for windows.
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(
        chart.xs,
        [[num_bytes / unit.size for num_bytes in sizes] for sizes in chart.heights.values()],
        colors=[GROUPS[group].colour for group in chart.heights],
        labels=[
            f"{GROUPS[group].name}  {format_size(at_peak[group])}" if group in at_peak else GROUPS[group].name
            for group in chart.heights
        ],
        linewidth=0,
    )
    axes.axvline(chart.peak_x, color="black", linewidth=1)
    limit = tensor_limit_bytes(planned)
    if limit is not None:
        axes.axhline(limit / unit.size, color="#b3261e", linestyle="--", linewidth=1, label="limit for tensors")
    for _, start, _ in chart.phases[1:]:
        axes.axvline(start, color="#808890", linestyle=":", linewidth=0.8)
    axes.set_xticks([(start + end) / 2 for _, start, end in chart.phases], [name for name, _, _ in chart.phases])
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(0, 1), ylabel=f"allocated, {unit.name}")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="at the peak", reverse=True)
    axes.set_title(describe_run(planned), fontsize=9, loc="left")
    figure.supxlabel(next(fact_sentences(planned)), fontsize=8)
    file = BytesIO()
    figure.savefig(file, format=file_format, dpi=160)
    return file.getvalue()
