"""The table of a search's listed rows, as text for the terminal and the HTML page (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sltrain_dist.plan.planned_run import PlannedRun
from sltrain_dist.plan.reports.sentences import format_size
from sltrain_dist.plan.search.combinations import Row
from sltrain_dist.tracking.console import format_count


@dataclass(frozen=True)
class SearchTable:
    """The rows that a search lists.

    Attributes:
        titles: Titles of the columns.
        settings: Those of the titles that name settings; the other columns hold figures.
        rows: Cells of each row, in the order of the titles. A cell is empty if its row has no such figure.
        shared: Sentence on the settings that are the same in all rows; empty if there are none.
    """

    titles: Sequence[str] = ()
    settings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    shared: str = ""


def search_table(planned: PlannedRun) -> SearchTable:
    """Returns the figures of the listed rows, and the settings in which they differ."""
    if not planned.rows:
        return SearchTable()
    settings = planned.rows[0].settings
    varying = [name for name in settings if len({row.settings[name] for row in planned.rows}) > 1]
    rows = [_cells(row, varying, planned.device_memory) for row in planned.rows]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    shared = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in varying)
    return SearchTable(
        titles=titles,
        settings=varying,
        rows=[[row.get(title, "") for title in titles] for row in rows],
        shared=f"In all of these: {shared}." if shared else "",
    )


def _cells(row: Row, settings: Sequence[str], device_memory: int | None) -> dict[str, str]:
    """Returns a row's cells by the title of their column."""
    spare = {}
    if device_memory is not None:
        mark = "~" if row.is_within_error(device_memory) else ""
        spare = {"to spare": f"{mark}{format_size(device_memory - row.device_bytes)}"}
    replayed = {} if row.replayed_bytes is None else {"replayed peak": format_size(row.replayed_bytes)}
    return {
        "speed": f"{row.relative_speed:.2f}",
        "device": format_size(row.device_bytes),
        **spare,
        "peak": format_size(row.peak_bytes),
        **replayed,
        **{name: row.settings[name] for name in settings},
        "parameters": format_count(row.parameters),
        "FLOPs/token": format_count(row.flops_per_token),
        "sent/update": format_size(row.comm_bytes_per_update) if row.comm_bytes_per_update else "0",
    }
