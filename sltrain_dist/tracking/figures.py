"""Figures of matplotlib in the project's look, as PNG files (no torch)."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """Returns a figure with room for a legend on the right, and its panels by row."""
    from matplotlib.figure import Figure  # slow to import; without pyplot, which would choose a backend for windows

    figure = Figure(figsize=(5.5 * columns + 2, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid.tolist()


def png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=160)
    return file.getvalue()
