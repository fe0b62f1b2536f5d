"""The planner's HTML page: prepares the values that the template page.html.j2 shows (no torch)."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sltrain_dist.errors import ConfigError
from sltrain_dist.files import delete_file, write_error
from sltrain_dist.plan.components import GROUPS, PHASES
from sltrain_dist.plan.planned_run import PlannedRun
from sltrain_dist.plan.reports.chart import StackedChart, axis_ticks, stacked_chart, tensor_limit_bytes
from sltrain_dist.plan.reports.component_table import DisplayUnit, component_rows, largest_points
from sltrain_dist.plan.reports.search_table import search_table
from sltrain_dist.plan.reports.sentences import (
    describe_run,
    fact_sentences,
    format_size,
    launch_sentences,
    search_sentences,
    suggested_changes,
    verdict,
)

_WIDTH, _HEIGHT = 1000, 300
"""Size of the chart in its own units; the browser stretches it to the page's width."""


def write_page(planned: PlannedRun, path: Path) -> None:
    """Writes the page to a file.

    Raises:
        ConfigError: The file cannot be written.
        StorageError: The disk is full; nothing of the file is left.
    """
    try:
        path.write_text(render_page(planned), encoding="utf-8")
    except OSError as error:
        delete_file(path)
        raise write_error(f"--html: cannot write {path}", error, ConfigError) from None


def render_page(planned: PlannedRun) -> str:
    """Returns the page as HTML text."""
    estimate = planned.estimate
    unit, chart, limit = DisplayUnit.of(estimate), stacked_chart(estimate), tensor_limit_bytes(planned)
    phases, parts = largest_points(estimate), component_rows([estimate.peak], unit)
    advice, changes = suggested_changes(planned)
    top = round(1.04 * max(estimate.peak_bytes, limit or 0))
    # Values are escaped; a name in the template without a value is an error.
    environment = Environment(
        loader=PackageLoader("sltrain_dist.plan.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": format_size, "percent": _percent}
    return environment.get_template("page.html.j2").render(
        title=describe_run(planned.config, planned.ranks),
        estimate=estimate,
        unit=unit,
        PHASES=PHASES,
        # The summary.
        planned=planned,
        meter_bytes=max(planned.device_memory or 0, estimate.device_bytes),
        facts=fact_sentences(planned),
        verdict=verdict(planned),
        advice=advice,
        changes=changes,
        # The tables of components.
        parts=parts,
        largest_part=max(part.sizes[0] for part in parts),
        phases=phases,
        phase_names=[PHASES[point.phase] for point in phases],
        phase_rows=component_rows(phases, unit),
        # The chart; `top` is the number of bytes at its upper edge.
        chart=chart,
        top=top,
        ticks=axis_ticks(top),
        limit=limit,
        view_box=f"0 0 {_WIDTH} {_HEIGHT}",
        areas=_areas(chart, top),
        # The search, if there was one.
        search_sentences=list(search_sentences(planned)),
        search=search_table(planned),
        launch_sentences=launch_sentences(planned),
    )


def _areas(chart: StackedChart, top: int) -> list[dict[str, str]]:
    """Returns the name, the colour and the polygon's corners of each group's area, in the chart's own units."""
    areas = []
    for group, (lower, upper) in chart.areas().items():
        corners = [*zip(chart.xs, upper, strict=True), *[*zip(chart.xs, lower, strict=True)][::-1]]
        points = " ".join(f"{_WIDTH * x:.1f},{_HEIGHT * (1 - num_bytes / top):.1f}" for x, num_bytes in corners)
        name, colour = GROUPS[group]
        areas.append({"name": name, "colour": colour, "points": points})
    return areas


def _percent(part: float, whole: float = 1, digits: int = 3) -> str:
    """Formats a share of a whole as a percentage, which CSS and SVG take as a length."""
    return f"{100 * part / whole:.{digits}f}%"
