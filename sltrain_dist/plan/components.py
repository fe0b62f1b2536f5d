"""Names, colours and order of memory components and phases, and their table, the same in all reports (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sltrain_dist.memory.result import Estimate, Group, Phase, Point


class GroupStyle(NamedTuple):
    """How reports show a group of components: its name, and its colour in CSS notation."""

    name: str
    colour: str


GROUPS: Mapping[Group, GroupStyle] = {
    "factors": GroupStyle("low-rank factors", "#2f6fc4"),
    "sparse_values": GroupStyle("sparse values", "#58a0ee"),
    "index": GroupStyle("index of the supports", "#8cc3f5"),
    "dense": GroupStyle("dense weights", "#5a6f8c"),
    "states": GroupStyle("optimizer states", "#8359b8"),
    "master_weights": GroupStyle("master weights", "#b08ad9"),
    "gradients": GroupStyle("gradients", "#d9861f"),
    "activations": GroupStyle("activations", "#35995e"),
    "temporaries": GroupStyle("temporaries", "#cc4b45"),
    "buffers": GroupStyle("engine buffers", "#2aa19b"),
    "batch": GroupStyle("batch", "#8a9199"),
}
"""Styles of the groups in the order in which reports stack them, long-lived ones first. All colours differ from black
and from white."""

PHASES: Mapping[Phase, str] = {
    "init": "start",
    "forward": "forward",
    "backward": "backward",
    "update": "update",
    "restart": "restart",
    "save": "save",
}
"""Names of the phases, in the order in which a run goes through them."""


def largest_group(estimate: Estimate) -> tuple[Group, int]:
    """Returns the group that takes the most bytes at the peak, and its bytes."""
    sums = estimate.peak.groups()
    group = max(GROUPS, key=lambda group: sums.get(group, 0))
    return group, sums[group]


class TableUnit(NamedTuple):
    """Unit of a report's tables: its name and its bytes."""

    name: str
    size: int

    def cell(self, num_bytes: int) -> str:
        """Formats a table's cell with three decimals, so that columns line up; empty if it would read 0.000."""
        return f"{num_bytes / self.size:,.3f}" if 2000 * num_bytes >= self.size else ""


def table_unit(estimate: Estimate) -> TableUnit:
    """Returns GB of 1e9 bytes, or MB of 1e6 bytes if the peak is below 1 GB."""
    return TableUnit("GB", 10**9) if estimate.peak_bytes >= 10**9 else TableUnit("MB", 10**6)


class ComponentRow(NamedTuple):
    """A row of the table: a group of components, or one component (a detail) of the group above it."""

    name: str
    colour: str
    is_detail: bool
    sizes: Sequence[int]
    """Bytes at each moment."""


def component_rows(points: Sequence[Point], unit: TableUnit) -> list[ComponentRow]:
    """Returns the rows of all groups that take bytes at any of the given moments, in the order of the reports.

    A group's components follow it if at least two of them are large enough to be seen in the unit.
    """
    rows = []
    for group, (name, colour) in GROUPS.items():
        components = sorted({key for point in points for key in point.components if key.partition(".")[0] == group})
        sizes = {key: [point.components.get(key, 0) for point in points] for key in components}
        if any(map(any, sizes.values())):
            rows.append(ComponentRow(name, colour, False, [sum(each) for each in zip(*sizes.values(), strict=True)]))
        visible = [key for key in components if unit.cell(max(sizes[key]))]
        if len(visible) > 1:
            details = {key: key.partition(".")[2].replace("_", " ") or "other" for key in visible}
            rows += [ComponentRow(detail, colour, True, sizes[key]) for key, detail in details.items()]
    return rows
