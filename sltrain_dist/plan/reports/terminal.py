"""What the planner found, printed as tables and sentences to the terminal (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sltrain_dist.memory.result import Estimate
from sltrain_dist.plan.components import PHASES
from sltrain_dist.plan.paper.accounting import PaperMemory
from sltrain_dist.plan.planned_run import PlannedRun
from sltrain_dist.plan.reports.component_table import DisplayUnit, component_rows, largest_points
from sltrain_dist.plan.reports.search_table import search_table
from sltrain_dist.plan.reports.sentences import (
    describe_run,
    fact_sentences,
    launch_sentences,
    search_sentences,
    suggested_changes,
    verdict,
)

_ANY_WIDTH = 10_000
"""A width that every table fits into, for measuring how wide a table would be."""


def print_plan(planned: PlannedRun) -> None:
    """Prints the components by phase, the sentences on them, and the rows of a search if there was one."""
    console = _console()
    console.print(f"[bold]{escape(describe_run(planned.config, planned.ranks))}[/]")
    _show(console, _components(planned.estimate))
    fits, (advice, changes) = verdict(planned), suggested_changes(planned)
    for line in filter(None, (*fact_sentences(planned), fits and fits.sentence, advice)):
        console.print(escape(line))
    for settings, outcome in changes:
        console.print(escape(f"  {settings}  ({outcome})"))
    if planned.search is not None:
        console.print()
        _print_search(console, planned)


def print_accounting(memory: PaperMemory, table: Sequence[PaperMemory]) -> None:
    """Prints the paper's memory accounting of all methods for one model, and marks the configured method."""
    console = _console()
    shown = _table()
    shown.add_column("G = 1e9 bytes")
    for name in ("parameters", "optimizer", "total"):
        shown.add_column(name, justify="right")
    for each in table:
        mark = " ◀" if each.method == memory.method else ""
        cells = (str(gb) for gb in (each.parameter_gb, each.optimizer_gb, each.total_gb))
        shown.add_row(each.method + mark, *cells, style="bold" if mark else "")
    _show(console, shown)
    console.print("As the paper's Table 2 counts: no gradients, no activations; parts are rounded, then added.")


def _console() -> Console:
    """Returns a console as wide as the terminal; without a terminal, wide enough for tables and whole sentences."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _show(console: Console, table: Table) -> None:
    """Prints a table, or, on a terminal that is too narrow for it, each row as a list of titles and values."""
    if console.measure(table, options=console.options.update(max_width=_ANY_WIDTH)).maximum <= console.width:
        console.print(table)
        return
    titles = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        head, *cells = (Text.from_markup(str(cell)).plain for cell in row)
        console.print(escape(f"{titles[0]} {head}" if table.columns[0].justify == "right" else head))
        pairs = [f"{title} {cell}" for title, cell in zip(titles[1:], cells, strict=True) if cell]
        line = ""
        for pair in pairs:
            if line and len(line) + 2 + len(pair) > console.width:
                console.print(escape(line))
                line = ""
            line += f"  {pair}"
        if line:
            console.print(escape(line))


def _components(estimate: Estimate) -> Table:
    """Returns the table of components at the largest moment of each phase; the phase of the peak is marked."""
    points, unit = largest_points(estimate), DisplayUnit.of(estimate)
    table = _table()
    table.add_column(f"{unit.name} ({unit.size:.0e} bytes)".replace("e+0", "e"), no_wrap=True)
    for point in points:
        is_peak = point.phase == estimate.peak.phase
        title = f"{PHASES[point.phase]} ◀" if is_peak else PHASES[point.phase]
        table.add_column(title, justify="right", style="bold" if is_peak else "", no_wrap=True)
    for row in component_rows(points, unit):
        name = f"    {escape(row.name)}" if row.is_detail else f"[{row.colour}]■[/] {row.name}"
        table.add_row(name, *map(unit.cell, row.sizes), style="dim" if row.is_detail else "")
    table.add_row("allocated", *(unit.cell(point.total) for point in points))
    if estimate.reserved_bytes:
        table.add_row("with context and slack", *(unit.cell(point.total + estimate.reserved_bytes) for point in points))
    return table


def _print_search(console: Console, planned: PlannedRun) -> None:
    for line in search_sentences(planned):
        console.print(escape(line))
    found = search_table(planned)
    if not found.rows:
        return
    table = _table()
    for title in found.titles:
        table.add_column(title, justify="left" if title in found.settings else "right")
    if planned.saved_files:
        table.add_column("file", overflow="fold")
    for index, cells in enumerate(found.rows):
        table.add_row(*cells, *planned.saved_files[index : index + 1])
    _show(console, table)
    for line in launch_sentences(planned):
        console.print(escape(line), soft_wrap=True)  # a command that is copied must be whole
    if found.shared:
        console.print(escape(found.shared))
    console.print("Speed is predicted, relative to the configuration above (docs/planner_search.md).")
