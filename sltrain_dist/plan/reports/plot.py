"""The chart of memory over one update as a picture file, drawn with matplotlib (no torch)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from sltrain_dist.errors import ConfigError
from sltrain_dist.files import delete_file, write_error
from sltrain_dist.plan.components import GROUPS
from sltrain_dist.plan.planned_run import PlannedRun
from sltrain_dist.plan.reports.chart import stacked_chart, tensor_limit_bytes
from sltrain_dist.plan.reports.component_table import DisplayUnit
from sltrain_dist.plan.reports.sentences import describe_run, fact_sentences, format_size

FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of the file formats that can be written."""


def write_plot(planned: PlannedRun, path: Path) -> None:
    """Draws allocated memory over one update, stacked by group, into a file.

    Raises:
        ConfigError: The suffix is not one of `FORMATS`, or the file cannot be written.
        StorageError: The disk is full.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the suffix must be one of {', '.join(FORMATS)}")
    figure = _figure(planned)
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        delete_file(path)
        raise write_error(f"--plot: cannot write {path}", error, ConfigError) from None


def _figure(planned: PlannedRun) -> Figure:
    estimate = planned.estimate
    chart, unit = stacked_chart(estimate), DisplayUnit.of(estimate)
    # A Figure of its own, because pyplot's would choose a backend for windows.
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for group, (lower, upper) in chart.areas().items():
        name, colour = GROUPS[group]
        at_peak = estimate.peak.groups().get(group, 0)
        label = f"{name}  {format_size(at_peak)}" if at_peak else name
        low, high = ([y / unit.size for y in edge] for edge in (lower, upper))
        axes.fill_between(chart.xs, low, high, color=colour, linewidth=0, label=label)
    axes.axvline(chart.peak_x, color="black", linewidth=1)
    limit = tensor_limit_bytes(planned)
    if limit is not None:
        axes.axhline(limit / unit.size, color="#b3261e", linestyle="--", linewidth=1, label="limit for tensors")
    for phase in chart.phases[1:]:
        axes.axvline(phase.start, color="#808890", linestyle=":", linewidth=0.8)
    axes.set_xticks([(phase.start + phase.end) / 2 for phase in chart.phases])
    axes.set_xticklabels([phase.name for phase in chart.phases])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"allocated, {unit.name}")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="at the peak"
    )
    axes.set_title(describe_run(planned.config, planned.ranks), fontsize=9, loc="left")
    figure.supxlabel(next(fact_sentences(planned)), fontsize=8)
    return figure
