"""The planner's HTML page: prepares the values that the template page.html.j2 shows (no torch)."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sltrain_dist.errors import ConfigError
from sltrain_dist.files import delete_file, write_error
from sltrain_dist.plan.answer import Answer
from sltrain_dist.plan.reports.drawing import Drawing, allocatable, draw, ticks
from sltrain_dist.plan.reports.labels import GROUPS, PHASES, Unit, component_rows, describe
from sltrain_dist.plan.reports.report import (
    facts,
    launch_sentences,
    remedies,
    search_sentences,
    search_table,
    size,
    verdict,
)

_WIDTH, _HEIGHT = 1000, 300
"""Size of the chart in its own units; the browser stretches it to the page's width."""


def write_page(known: Answer, path: Path) -> None:
    """Writes the page to a file.

    Raises:
        ConfigError: The file cannot be written.
        StorageError: The disk is full; nothing of the file is left.
    """
    try:
        path.write_text(render_page(known), encoding="utf-8")
    except OSError as error:
        delete_file(path)
        raise write_error(f"--html: cannot write {path}", error, ConfigError) from None


def render_page(known: Answer) -> str:
    """Returns the page as HTML text."""
    estimate, drawing, ceiling = known.estimate, draw(known.estimate), allocatable(known)
    largest, unit = estimate.phases(), Unit.of(estimate)
    phases = [largest[phase] for phase in PHASES if phase in largest]
    parts = component_rows([estimate.peak], unit)
    advice, changes = remedies(known)
    top = round(1.04 * max(estimate.peak_bytes, ceiling or 0))
    # Every value is escaped, and one that the template names and that is not here is an error.
    environment = Environment(
        loader=PackageLoader("sltrain_dist.plan.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "percent": _percent}
    return environment.get_template("page.html.j2").render(
        title=describe(known.config, known.ranks),
        estimate=estimate,
        unit=unit,
        PHASES=PHASES,
        # The summary.
        device_memory=known.device_memory,
        fits=known.fits,
        meter_bytes=max(known.device_memory or 0, estimate.device_bytes),
        facts=facts(known),
        verdict=verdict(known),
        tone=_tone(known),
        advice=advice,
        changes=changes,
        # The tables of components.
        parts=parts,
        largest_part=max(part.sizes[0] for part in parts),
        phases=phases,
        phase_names=[PHASES[point.phase] for point in phases],
        phase_rows=component_rows(phases, unit),
        # The chart; `top` is the number of bytes at its upper edge.
        drawing=drawing,
        top=top,
        ticks=ticks(top),
        ceiling=ceiling,
        view_box=f"0 0 {_WIDTH} {_HEIGHT}",
        areas=_areas(drawing, top),
        # The search, if there was one.
        search_sentences=list(search_sentences(known)),
        search=search_table(known),
        files=known.saved,
        launch_sentences=launch_sentences(known),
    )


def _tone(known: Answer) -> str:
    """Returns the verdict's style: bad, warn where the margin is less than the estimate's error, else good."""
    margin, estimate = known.margin_bytes or 0, known.estimate
    if margin < 0:
        return "bad"
    return "warn" if margin < estimate.relative_error * estimate.peak_bytes else "good"


def _areas(drawing: Drawing, top: int) -> list[dict[str, str]]:
    """Returns name, colour and corners of each group's area, in the chart's own units."""
    areas = []
    for group, (lower, upper) in drawing.stacked().items():
        corners = [*zip(drawing.xs, upper, strict=True), *reversed([*zip(drawing.xs, lower, strict=True)])]
        points = " ".join(f"{_WIDTH * x:.1f},{_HEIGHT * (1 - num_bytes / top):.1f}" for x, num_bytes in corners)
        name, colour = GROUPS[group]
        areas.append({"name": name, "colour": colour, "points": points})
    return areas


def _percent(part: float, whole: float = 1, digits: int = 3) -> str:
    return f"{100 * part / whole:.{digits}f}%"
