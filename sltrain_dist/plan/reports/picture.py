"""What the planner found as a picture, by matplotlib (no torch)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from sltrain_dist.errors import ConfigError
from sltrain_dist.files import delete_file, write_error
from sltrain_dist.plan.answer import Answer
from sltrain_dist.plan.reports.drawing import allocatable, draw
from sltrain_dist.plan.reports.labels import GROUPS, Unit, describe
from sltrain_dist.plan.reports.report import facts, size

FORMATS = (".png", ".svg", ".pdf")
"""Kinds of files, by their suffix."""


def write_picture(known: Answer, path: Path) -> None:
    """Draws allocated memory over one update, stacked by kind.

    Raises:
        ConfigError: The suffix names no known format, or the file cannot be written.
        StorageError: The disk is full.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the suffix must be one of {', '.join(FORMATS)}")
    figure = _figure(known)
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        delete_file(path)
        raise write_error(f"--plot: cannot write {path}", error, ConfigError) from None


def _figure(known: Answer) -> Figure:
    estimate, drawing, unit = known.estimate, draw(known.estimate), Unit.of(known.estimate)
    # A Figure of its own, not pyplot's, which would choose a backend for windows.
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    areas = drawing.stacked()
    for group, (lower, upper) in areas.items():
        name, colour = GROUPS[group]
        at_peak = estimate.peak.groups().get(group, 0)
        label = f"{name}  {size(at_peak)}" if at_peak else name
        low, high = ([y / unit.size for y in edge] for edge in (lower, upper))
        axes.fill_between(drawing.xs, low, high, color=colour, linewidth=0, label=label)
    axes.axvline(drawing.peak_x, color="black", linewidth=1)
    ceiling = allocatable(known)
    if ceiling is not None:
        axes.axhline(ceiling / unit.size, color="#b3261e", linestyle="--", linewidth=1, label="left to tensors")
    for stretch in drawing.stretches[1:]:
        axes.axvline(stretch.start, color="#808890", linestyle=":", linewidth=0.8)
    axes.set_xticks([(each.start + each.end) / 2 for each in drawing.stretches])
    axes.set_xticklabels([each.name for each in drawing.stretches])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"allocated, {unit.name}")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="at the peak"
    )
    axes.set_title(describe(known.config, known.ranks), fontsize=9, loc="left")
    figure.supxlabel(next(facts(known)), fontsize=8)
    return figure
