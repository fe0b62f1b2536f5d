"""The planner's HTML page, rendered from the template page.html.j2 (no torch)."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from sltrain_dist.plan.components import GROUPS, PHASES, component_rows, table_unit
from sltrain_dist.plan.planned_run import PlannedRun
from sltrain_dist.plan.reports import sentences
from sltrain_dist.plan.reports.chart import StackedChart, axis_ticks, stacked_chart, tensor_limit_bytes

_WIDTH, _HEIGHT = 1000, 300
"""Size of the chart in its own units; the browser stretches it to the page's width."""


def render_page(planned: PlannedRun) -> str:
    """Returns the page as HTML text."""
    estimate = planned.estimate
    unit, chart, limit = table_unit(estimate), stacked_chart(estimate), tensor_limit_bytes(planned)
    phases = list(estimate.phases().values())
    top = round(1.04 * max(estimate.peak_bytes, limit or 0))  # bytes at the chart's upper edge
    # Values are escaped; a name in the template without a value is an error.
    environment = Environment(
        loader=PackageLoader("sltrain_dist.plan.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": sentences.format_size, "percent": _percent}
    return environment.get_template("page.html.j2").render(
        planned=planned,
        estimate=estimate,
        unit=unit,
        PHASES=PHASES,
        sentences=sentences,
        parts=component_rows([estimate.peak], unit),
        phases=phases,
        phase_names=[PHASES[point.phase] for point in phases],
        phase_rows=component_rows(phases, unit),
        chart=chart,
        top=top,
        ticks=axis_ticks(top),
        limit=limit,
        view_box=f"0 0 {_WIDTH} {_HEIGHT}",
        areas=_areas(chart, top),
    )


def _areas(chart: StackedChart, top: int) -> list[dict[str, str]]:
    """Returns the name, the colour and the polygon's corners of each group's area, in the chart's own units."""
    areas, lower = [], [0] * len(chart.xs)
    for group, sizes in chart.heights.items():
        upper = [low + size for low, size in zip(lower, sizes, strict=True)]
        corners = [*zip(chart.xs, upper, strict=True), *[*zip(chart.xs, lower, strict=True)][::-1]]
        points = " ".join(f"{_WIDTH * x:.1f},{_HEIGHT * (1 - num_bytes / top):.1f}" for x, num_bytes in corners)
        areas.append({**GROUPS[group]._asdict(), "points": points})
        lower = upper
    return areas


def _percent(part: float, whole: float = 1, digits: int = 3) -> str:
    """Formats a share of a whole as a percentage, which CSS and SVG take as a length."""
    return f"{100 * part / whole:.{digits}f}%"
