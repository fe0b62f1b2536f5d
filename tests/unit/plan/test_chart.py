"""The layout of the planner's chart, and the rows of its table."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain_dist.memory.result import Estimate, Point
from sltrain_dist.plan.components import GROUPS, TableUnit, component_rows
from sltrain_dist.plan.reports.chart import axis_ticks, stacked_chart


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["forward", "backward"]), st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1
    )
)
def test_drawing(moments: list[tuple[str, int, int]]) -> None:
    points = tuple(Point(phase, "", {"states": a, "batch": b}) for phase, a, b in moments)  # type: ignore[arg-type]
    chart = stacked_chart(Estimate(points, 0, 1, 1, 0, 0.05))
    assert list(chart.xs) == sorted(chart.xs) and 0 <= min(chart.xs) <= max(chart.xs) <= 1 + 1e-9
    assert list(chart.heights) == [group for group in GROUPS if group in chart.heights]
    if chart.heights:
        top = [sum(sizes) for sizes in zip(*chart.heights.values(), strict=True)]
        assert top[0] == top[1] and top[-2] == top[-1]  # level at both ends
        assert max(top) == max(a + b for _, a, b in moments)
        at_peak = [y for x, y in zip(chart.xs, top, strict=True) if x == chart.peak_x]
        assert max(top) in at_peak


@given(st.integers(1, 10**15))
def test_ticks(top: int) -> None:
    values = axis_ticks(top)
    assert values[0] == 0 and values[-1] <= top and (top < 3 or 2 <= len(values) <= 7)


def test_components_follow_their_group_if_two_of_them_can_be_seen() -> None:
    sizes = {"activations.mlp": 10**9, "activations.loss": 10**9, "dense": 10**9, "dense.rotary": 1}
    rows = component_rows([Point("forward", "", sizes)], TableUnit("GB", 10**9))
    assert [row.name for row in rows] == ["dense weights", "activations", "loss", "mlp"]
    assert [row.is_detail for row in rows] == [False, False, True, True]
    assert [list(row.sizes) for row in rows] == [[10**9 + 1], [2 * 10**9], [10**9], [10**9]]
