"""Curves of runs from their metrics.jsonl, as a picture or as text for a terminal: no server is needed (no torch)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sltrain_dist.config.run_files import METRICS
from sltrain_dist.errors import ConfigError, DataError
from sltrain_dist.tracking.figures import new_figure, png
from sltrain_dist.tracking.jsonl import read_records

_POINTS = 400
"""Most points of a curve: each is the mean of neighbouring log lines."""
_HIDDEN = 0.1
"""Share of a curve of many points, from its start, that may lie above the picture: the loss falls fastest there."""


class MetricCurve(NamedTuple):
    """A metric of a run."""

    name: str
    """The run directory, as the user has given it."""
    x: list[float]
    y: list[float]


def read_curve(run_dir: Path, metric: str, by: str) -> MetricCurve:
    """Reads a metric of a run, as means of neighbouring log lines if there are many.

    Args:
        run_dir: The run directory.
        metric: Key of the metric in metrics.jsonl.
        by: Key of what it is shown by, such as "tokens".

    Returns:
        The curve. Values that are not finite are left out.

    Raises:
        ConfigError: The run has no such metric.
        DataError: There is no metrics.jsonl, or it is damaged.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give the directory of a run")
    records = read_records(path)
    pairs = [(float(line[by]), float(line[metric])) for line in records if metric in line and by in line]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if not pairs:
        known = sorted({key for line in records for key, value in line.items() if isinstance(value, (int, float))})
        raise ConfigError(f"{path} has no {metric} by {by}; it has {', '.join(known) or 'no lines yet'}")
    size = math.ceil(len(pairs) / _POINTS)
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    x, y = ([statistics.fmean(pair[i] for pair in group) for group in groups] for i in (0, 1))
    return MetricCurve(str(run_dir), x, y)


def draw_picture(curves: Sequence[MetricCurve], metric: str, by: str) -> bytes:
    """Draws curves in one panel; returns a PNG file."""
    figure, [[axes]] = new_figure(1, 1)
    for curve in curves:
        axes.plot(curve.x, curve.y, linewidth=1.2, label=curve.name, marker="." if len(curve.x) < 3 else None)
    axes.set(xlabel=by, ylabel=metric)
    if metric.endswith("loss"):
        axes.set_ylim(top=_top(curves))
    figure.legend(loc="outside upper center", frameon=False)
    return png(figure)


def draw_text(curves: Sequence[MetricCurve], metric: str, by: str, width: int, height: int) -> str:
    """Draws curves with characters.

    Args:
        curves: The curves.
        metric: Name of what they show.
        by: Name of what it is shown by.
        width: Columns of the drawing.
        height: Lines of the drawing.
    """
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")  # no colours: curves are told apart by their characters, also in a file
    for number, curve in enumerate(curves):
        marker = "braille" if len(curves) == 1 else "abcdefghijklmnopqrstuvwxyz"[number % 26]
        plotext.plot(curve.x, curve.y, label=curve.name if len(curves) > 1 else None, marker=marker)
    plotext.plot_size(width, height)
    plotext.xlabel(by)
    plotext.title(metric)
    if metric.endswith("loss") and (top := _top(curves)) > (bottom := min(min(curve.y) for curve in curves)):
        plotext.ylim(bottom, top)
    text: str = plotext.uncolorize(plotext.build())
    return text


def _top(curves: Sequence[MetricCurve]) -> float:
    return max(max(curve.y[math.floor(_HIDDEN * len(curve.y)) :]) for curve in curves)
