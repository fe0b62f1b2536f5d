"""The table of bytes by component and moment, as text for the terminal and the HTML page (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sltrain_dist.memory.result import Estimate, Point
from sltrain_dist.plan.components import GROUPS, PHASES, detail_of, group_of


@dataclass(frozen=True)
class DisplayUnit:
    """The unit of a report's tables: GB of 1e9 bytes, or MB of 1e6 bytes for small runs."""

    name: str
    size: int

    @staticmethod
    def of(estimate: Estimate) -> DisplayUnit:
        """Returns the unit for an estimate: GB if the peak is at least 1 GB."""
        return DisplayUnit("GB", 10**9) if estimate.peak_bytes >= 10**9 else DisplayUnit("MB", 10**6)

    def cell(self, num_bytes: int) -> str:
        """Formats a table's cell with three decimals, so that columns line up; empty if it would read 0.000."""
        return f"{num_bytes / self.size:,.3f}" if 2000 * num_bytes >= self.size else ""


@dataclass(frozen=True)
class ComponentRow:
    """One row of the table: a group of components, or one component of the group above it.

    Attributes:
        name: Name of the group, or of the component within its group.
        colour: Colour of the group.
        is_detail: Whether the row is one component of a group.
        sizes: Bytes at each moment.
    """

    name: str
    colour: str
    is_detail: bool
    sizes: Sequence[int]


def component_rows(points: Sequence[Point], unit: DisplayUnit) -> list[ComponentRow]:
    """Returns the rows of all groups that take bytes at any of the given moments, in the order of the reports.

    A group's components follow it if at least two of them are large enough to be seen in the unit.
    """
    rows = []
    for group, (name, colour) in GROUPS.items():
        sums = [point.groups().get(group, 0) for point in points]
        if not any(sums):
            continue
        rows.append(ComponentRow(name, colour, False, sums))
        components = sorted({key for point in points for key in point.components if group_of(key) == group})
        sizes = {key: [point.components.get(key, 0) for point in points] for key in components}
        visible = {key: each for key, each in sizes.items() if max(each) >= unit.size / 2000}
        if len(visible) > 1:
            rows += [ComponentRow(detail_of(key), colour, True, each) for key, each in visible.items()]
    return rows


def largest_points(estimate: Estimate) -> list[Point]:
    """Returns the largest moment of each phase, in the order of the phases."""
    largest = estimate.phases()
    return [largest[phase] for phase in PHASES if phase in largest]
