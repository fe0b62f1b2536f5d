"""What the planner found as one page of HTML without scripts or anything from elsewhere (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from sltrain_dist.errors import ConfigError
from sltrain_dist.files import delete_file, write_error
from sltrain_dist.memory.result import Group, Point
from sltrain_dist.plan.answer import Answer
from sltrain_dist.plan.reports.drawing import Drawing, allocatable, draw, ticks
from sltrain_dist.plan.reports.labels import GROUPS, PHASES, Unit, describe, detail_of
from sltrain_dist.plan.reports.page_style import STYLE
from sltrain_dist.plan.reports.report import (
    facts,
    launch_sentences,
    remedies,
    row_cells,
    search_sentences,
    size,
    varying,
    verdict,
)

_WIDTH, _HEIGHT = 1000, 300
"""Of the drawing, which is stretched to the page's width; text stands beside it, not in it."""


def write_page(known: Answer, path: Path) -> None:
    """Writes the page.

    Raises:
        ConfigError: The file cannot be written.
        StorageError: The disk is full; nothing of the file is left.
    """
    try:
        path.write_text(page(known), encoding="utf-8")
    except OSError as error:
        delete_file(path)
        raise write_error(f"--html: cannot write {path}", error, ConfigError) from None


def page(known: Answer) -> str:
    """The page."""
    title = describe(known.config, known.ranks)
    sections = [_summary(known), _parts(known), _timeline(known), _phases(known)]
    if known.found is not None:
        sections.append(_search(known))
    sections.append(_moments(known))
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Memory plan: {escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="quiet">Memory of one device, as <code>sltrain plan</code> predicts it. GB = 1e9 bytes, MB = 1e6.</p>
{body}
</main>
</body>
</html>
"""


def _summary(known: Answer) -> str:
    estimate, device = known.estimate, known.device_memory
    room = max(device or 0, estimate.device_bytes)
    bars = [
        f'<i style="width:{_percent(sum_, room)};background:{GROUPS[group][1]}" title="{name}"></i>'
        for group, name, sum_ in _groups(estimate.peak)
    ]
    if estimate.reserved_bytes:
        bars.append(
            f'<i class="slack" style="width:{_percent(estimate.reserved_bytes, room)}" title="context, slack"></i>'
        )
    if known.margin_bytes is not None and known.margin_bytes < 0:
        bars.append(f'<b style="left:{_percent(device or 0, room)}"></b>')
    advice, changes = remedies(known)
    lines = [f"<p>{escape(line)}</p>" for line in facts(known)]
    if (fits := verdict(known)) is not None:
        lines.append(f'<p class="{_tone(known)}">{escape(fits)}</p>')
    lines += [f"<p>{escape(advice)}</p>"] if advice else []
    lines += ['<ul class="changes">'] if changes else []
    lines += [f"<li><code>{escape(settings)}</code> ({escape(outcome)})</li>" for settings, outcome in changes]
    lines += ["</ul>"] if changes else []
    of = "" if device is None else f' <span class="quiet">of {size(device)}</span>'
    reserved = f", and {size(estimate.reserved_bytes)} for context, workspaces and allocator slack"
    return f"""<section>
<p class="big">{size(estimate.device_bytes)}{of}</p>
<p class="quiet">{size(estimate.peak_bytes)} allocated at the peak{reserved if estimate.reserved_bytes else ""}</p>
<div class="meter" aria-hidden="true">{"".join(bars)}</div>
{"".join(lines)}
</section>"""


def _tone(known: Answer) -> str:
    """The verdict's colour: red, amber where the margin is less than the estimate's error, green."""
    margin, estimate = known.margin_bytes or 0, known.estimate
    if margin < 0:
        return "bad"
    return "warn" if margin < estimate.relative_error * estimate.peak_bytes else "good"


def _parts(known: Answer) -> str:
    """The peak by group, with details."""
    peak = known.estimate.peak
    largest = max(sum_ for _, _, sum_ in _groups(peak))
    rows = []
    for group, name, sum_ in _groups(peak):
        bar = f'<div class="bar" style="width:{_percent(sum_, largest)};background:{GROUPS[group][1]}"></div>'
        rows.append(
            f'<dt><span class="swatch" style="background:{GROUPS[group][1]}"></span>{name}</dt>'
            f'<dd class="track">{bar}</dd><dd class="number">{size(sum_)}</dd>'
            f'<dd class="number quiet">{sum_ / peak.total:.1%}</dd>'
        )
        for key in Unit.of(known.estimate).details(group, [peak]):
            rows.append(
                f'<dt class="detail">{escape(detail_of(key))}</dt><dd class="track"></dd>'
                f'<dd class="number detail">{size(peak.components[key])}</dd><dd></dd>'
            )
    return f"""<section>
<h2>What takes it at the peak</h2>
<dl class="parts">{"".join(rows)}</dl>
</section>"""


def _timeline(known: Answer) -> str:
    """The drawing, with text of the page around it."""
    estimate, drawing, ceiling = known.estimate, draw(known.estimate), allocatable(known)
    top, unit = round(1.04 * max(estimate.peak_bytes, ceiling or 0)), Unit.of(estimate)
    labels = [
        f'<span class="tick" style="top:{100 * (1 - tick / top):.2f}%">{tick / unit.size:g} {unit.name}</span>'
        for tick in ticks(top)
    ]
    side = "left" if drawing.peak_x <= 0.5 else "right"  # the label's own side, so that it stays within the page
    offset = 100 * (drawing.peak_x if side == "left" else 1 - drawing.peak_x)
    labels.append(f'<span class="above" style="{side}:{offset:.2f}%">peak {size(estimate.peak_bytes)}</span>')
    phases = "".join(
        f'<span style="width:{100 * (each.end - each.start):.2f}%">{each.name}</span>' for each in drawing.stretches
    )
    legend = "".join(
        f'<li><span class="swatch" style="background:{GROUPS[group][1]}"></span>{GROUPS[group][0]}</li>'
        for group in drawing.heights
    )
    if ceiling is not None:
        legend += f'<li><span class="ceiling"></span>what {size(known.device_memory or 0)} leave to tensors</li>'
    return f"""<section>
<h2>Over one update</h2>
<div class="plot">
{_svg(drawing, top, ceiling)}
{"".join(labels)}
</div>
<div class="phases" aria-hidden="true">{phases}</div>
<ul class="legend">{legend}</ul>
<p class="quiet">Moments in their order, evenly spaced within a phase: widths are not times.</p>
</section>"""


def _svg(drawing: Drawing, top: int, ceiling: int | None) -> str:
    """Areas, grid and marks, without text, which would be stretched."""

    def at(x: float, num_bytes: int) -> str:
        return f"{_WIDTH * x:.1f},{_HEIGHT * (1 - num_bytes / top):.1f}"

    def line(kind: str, start: str, end: str) -> str:
        (x1, y1), (x2, y2) = start.split(","), end.split(",")
        return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'

    shapes = [line("grid", at(0, tick), at(1, tick)) for tick in ticks(top)]
    for group, (lower, upper) in drawing.stacked().items():
        there = [at(x, y) for x, y in zip(drawing.xs, upper, strict=True)]
        back = [at(x, y) for x, y in zip(drawing.xs, lower, strict=True)][::-1]
        name, colour = GROUPS[group]
        shapes.append(f'<polygon points="{" ".join(there + back)}" fill="{colour}"><title>{name}</title></polygon>')
    shapes += [line("border", at(each.start, 0), at(each.start, top)) for each in drawing.stretches[1:]]
    shapes.append(line("peak", at(drawing.peak_x, 0), at(drawing.peak_x, top)))
    if ceiling is not None:
        shapes.append(line("device", at(0, ceiling), at(1, ceiling)))
    says = "Allocated memory over one update, stacked by kind; the tables below have its numbers"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{says}">'
        f"{''.join(shapes)}</svg>"
    )


def _phases(known: Answer) -> str:
    """The table of groups by phase."""
    largest, unit = known.estimate.phases(), Unit.of(known.estimate)
    points = [largest[phase] for phase in PHASES if phase in largest]
    titles = [PHASES[point.phase] for point in points]
    rows = []
    for group, (name, colour) in GROUPS.items():
        sums = [point.groups().get(group, 0) for point in points]
        if not any(sums):
            continue
        swatch = f'<span class="swatch" style="background:{colour}"></span>'
        rows.append(_table_row("", f"{swatch}{name}", titles, map(unit.cell, sums)))
        for key in unit.details(group, points):
            sizes = (unit.cell(point.components.get(key, 0)) for point in points)
            rows.append(_table_row("detail", escape(detail_of(key)), titles, sizes))
    rows.append(_table_row("total", "allocated", titles, (unit.cell(point.total) for point in points)))
    where = [f"{PHASES[point.phase]}: {escape(point.where)}" for point in points if point.where]
    return f"""<section>
<h2>Largest moment of each phase, {unit.name}</h2>
{_table(["", *titles], rows, stack=True)}
<p class="quiet">{"; ".join(where)}.</p>
</section>"""


def _search(known: Answer) -> str:
    names, shared = varying(known.rows)
    rows = [row_cells(row, names, known.device_memory) for row in known.rows]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = "".join(f"<p>{escape(line)}</p>" for line in search_sentences(known))
    table_rows = []
    for number, row in enumerate(rows, start=1):
        saved = f" <code>{escape(known.saved[number - 1])}</code>" if known.saved else ""
        table_rows.append(_table_row("", f"{number}{saved}", titles, (escape(row.get(title, "")) for title in titles)))
    same = ", ".join(f"{name} {value}" for name, value in shared.items())
    note = f"In all of these: {same}. " if same else ""
    starts = "".join(f"<p>{escape(line)}</p>" for line in launch_sentences(known))
    table = _table(["row", *titles], table_rows, stack=True) if rows else ""
    return f"""<section>
<h2>Search</h2>
{lines}
{table}
{starts}
<p class="quiet">{escape(note)}Speed is predicted, relative to the configuration above.</p>
</section>"""


def _moments(known: Answer) -> str:
    unit = Unit.of(known.estimate)
    titles = ["phase", unit.name]
    rows = [
        _table_row("", escape(point.where), titles, (PHASES[point.phase], unit.cell(point.total)))
        for point in known.estimate.timeline
    ]
    return f"""<section>
<details><summary>All {len(rows)} moments as a table</summary>
{_table(["moment", *titles], rows, stack=False)}
</details>
</section>"""


def _table(titles: Sequence[str], rows: Sequence[str], *, stack: bool) -> str:
    """A table; one that stacks becomes a list on a narrow screen, with its roles said, for screen readers."""
    heads = "".join(
        f'<th role="columnheader" scope="col"{"" if index == 0 else " class=number"}>{escape(title)}</th>'
        for index, title in enumerate(titles)
    )
    return (
        f'<table role="table"{" class=stack" if stack else ""}>'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def _table_row(kind: str, head: str, titles: Sequence[str], cells: Iterable[str]) -> str:
    inner = "".join(
        f'<td role="cell" class="number" data-title="{escape(title)}">{cell}</td>'
        for title, cell in zip(titles, cells, strict=True)
    )
    return f'<tr role="row" class="{kind}"><th role="rowheader" scope="row">{head}</th>{inner}</tr>'


def _groups(point: Point) -> list[tuple[Group, str, int]]:
    """(group, name, bytes) of what is there, in the order of the reports."""
    sums = point.groups()
    return [(group, name, sums[group]) for group, (name, _) in GROUPS.items() if group in sums]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3f}%"
