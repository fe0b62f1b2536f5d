"""The planner's results, printed to the terminal as tables and sentences (no torch)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sltrain_dist.memory.result import Estimate
from sltrain_dist.plan.components import PHASES, component_rows, table_unit
from sltrain_dist.plan.planned_run import PlannedRun
from sltrain_dist.plan.reports import sentences

_NO_BREAK = "\N{NO-BREAK SPACE}"
"""Keeps a title and its value on one line."""


def print_plan(planned: PlannedRun) -> None:
    """Prints the components by phase, sentences about them, and the rows of a search if there was one."""
    console = _console()
    console.print(sentences.describe_run(planned), style="bold")
    _show(console, _components(planned.estimate))
    _, verdict = sentences.verdict(planned)
    advice, changes = sentences.suggested_changes(planned)
    for line in filter(None, (*sentences.fact_sentences(planned), verdict, advice)):
        console.print(line)
    for settings, outcome in changes:
        console.print(f"  {settings}  ({outcome})")
    if planned.search is not None:
        console.print()
        _print_search(console, planned)


def print_accounting(accounting: Mapping[str, Any]) -> None:
    """Prints the paper's accounting, as :func:`accounting_json` returns it, and marks the configured method."""
    console, table = _console(), _table()
    table.add_column("G = 1e9 bytes")
    for name in ("parameters", "optimizer", "total"):
        table.add_column(name, justify="right")
    for method, memory in accounting["methods"].items():
        mark, style = (" ◀", "bold") if method == accounting["method"] else ("", "")
        cells = [f"{memory[key]:.2f}" for key in ("parameter_gb", "optimizer_gb", "total_gb")]
        table.add_row(method + mark, *cells, style=style)
    _show(console, table)
    console.print("Counted as in the paper's Table 2: no gradients, no activations; parts are rounded, then added.")


def _console() -> Console:
    """Returns a console as wide as the terminal; without a terminal, wide enough for tables and whole sentences."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    return console


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _show(console: Console, table: Table) -> None:
    """Prints a table, or, on a terminal that is too narrow for it, each row as a list of titles and values."""
    wider_than_any_table = console.options.update(max_width=10_000)
    if console.measure(table, options=wider_than_any_table).maximum <= console.width:
        console.print(table)
        return
    titles = [str(column.header) for column in table.columns]
    # The console itself breaks words that are longer than a line.
    wrapper = textwrap.TextWrapper(console.width, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent = wrapper.subsequent_indent = "  "
    for head, *cells in zip(*(column.cells for column in table.columns), strict=True):
        console.print(f"{titles[0]} {head}" if table.columns[0].justify == "right" else head)
        pairs = [f"{title} {cell}" for title, cell in zip(titles[1:], cells, strict=True) if cell]
        for line in wrapper.wrap("  ".join(pair.replace(" ", _NO_BREAK) for pair in pairs)):
            console.print(line.replace(_NO_BREAK, " "))


def _components(estimate: Estimate) -> Table:
    """Returns the table of components at the largest moment of each phase; the phase of the peak is marked."""
    points, unit = list(estimate.phases().values()), table_unit(estimate)
    table = _table()
    table.add_column(f"{unit.name} ({unit.size:.0e} bytes)".replace("e+0", "e"), no_wrap=True)
    for point in points:
        mark, style = (" ◀", "bold") if point.phase == estimate.peak.phase else ("", "")
        table.add_column(PHASES[point.phase] + mark, justify="right", style=style, no_wrap=True)
    for row in component_rows(points, unit):
        name = f"    {row.name}" if row.is_detail else Text.assemble(("■", row.colour), f" {row.name}")
        table.add_row(name, *map(unit.cell, row.sizes), style="dim" if row.is_detail else "")
    table.add_row("allocated", *(unit.cell(point.total) for point in points))
    if estimate.reserved_bytes:
        table.add_row("with context and slack", *(unit.cell(point.total + estimate.reserved_bytes) for point in points))
    return table


def _print_search(console: Console, planned: PlannedRun) -> None:
    for line in sentences.search_sentences(planned):
        console.print(line)
    if not planned.rows:
        return
    table = _table()
    columns = sentences.search_columns(planned)
    for title in columns:
        table.add_column(title, justify="left" if title in planned.rows[0].settings else "right")
    if planned.saved_files:
        table.add_column("file", overflow="fold")
        columns["file"] = list(planned.saved_files)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    _show(console, table)
    for line in sentences.launch_sentences(planned):
        console.print(line, soft_wrap=True)  # a command that is copied must be whole
    shared = sentences.shared_settings(planned)
    if shared:
        console.print(shared)
    console.print("Speed is predicted, relative to the configuration above (docs/planner_search.md).")
