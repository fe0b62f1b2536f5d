"""The pictures of a study: loss by tokens and by time, perplexity by memory (no torch)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sltrain_dist.study.agenda import Results
from sltrain_dist.study.comparison import ArmResult, reported_results
from sltrain_dist.study.study_file import Study
from sltrain_dist.study.trial_result import TrialStatus, metric_lines
from sltrain_dist.tracking.figures import new_figure, png

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

Colour = tuple[float, float, float, float]

_POINTS = 60
"""Most points of a curve: each is the mean of neighbouring log lines, so that curves can be told apart."""
_HIDDEN = 0.1
"""Share of a curve, from its start, that may lie above the picture: the loss falls fastest there."""


class Curve(NamedTuple):
    """Training loss of an arm, as a mean over its reported trials and over neighbouring log lines."""

    tokens: list[float]
    """Tokens trained on."""
    elapsed_s: list[float]
    """Seconds since the start of the run."""
    loss: list[float]
    """Training loss in nats per token."""


def loss_curve(study: Study, arm: str, budget: int, results: Results) -> Curve | None:
    """Returns the curve of an arm at a budget; None if none of its trials is done."""
    done = [each for each in reported_results(study, arm, budget, results) if each.status is TrialStatus.DONE]
    runs = [[line for line in metric_lines(each.trial.run_dir) if "loss" in line] for each in done]
    # With padded rows, the trials of two seeds may differ by a few updates.
    shortest = min(map(len, runs), default=0)
    if not shortest:
        return None
    size = math.ceil(shortest / _POINTS)
    found = {
        key: [
            statistics.fmean(float(line[key]) for run in runs for line in run[start : min(start + size, shortest)])
            for start in range(0, shortest, size)
        ]
        for key in Curve._fields
    }
    return Curve(**found)


def draw_losses(study: Study, results: Results) -> bytes:
    """Draws the training loss by tokens (left) and by time (right), one row per budget; returns a PNG file."""
    budgets, colours = study.file.budgets, _colours(study)
    figure, grid = new_figure(len(budgets), 2)
    for budget, (by_tokens, by_time) in zip(budgets, grid, strict=True):
        tops = []
        for arm in study.file.arms:
            curve = loss_curve(study, arm, budget, results)
            if curve is None:
                continue
            by_tokens.plot(curve.tokens, curve.loss, color=colours[arm], linewidth=1.2, label=arm)
            by_time.plot(curve.elapsed_s, curve.loss, color=colours[arm], linewidth=1.2)
            tops.append(curve.loss[math.ceil(_HIDDEN * (len(curve.loss) - 1))])
        by_tokens.set(xlabel="tokens", ylabel="training loss, nats per token", title=f"{budget:,} tokens")
        by_time.set(xlabel="seconds")
        for axes in (by_tokens, by_time):
            axes.set_xlim(left=0)
            if tops:
                axes.set_ylim(top=max(tops))
    _add_legend(figure)
    return png(figure)


def draw_memory(study: Study, arms: Sequence[ArmResult]) -> bytes:
    """Draws validation perplexity (mean and range over seeds) by observed memory, one panel per budget, as a PNG."""
    budgets, colours = study.file.budgets, _colours(study)
    figure, grid = new_figure(len(budgets), 1)
    for budget, (axes,) in zip(budgets, grid, strict=True):
        for arm in arms:
            if arm.budget != budget or arm.perplexity is None or arm.memory_bytes is None:
                continue
            mean, least, most = arm.perplexity.mean, arm.perplexity.least, arm.perplexity.most
            ranges, colour = [[mean - least], [most - mean]], colours[arm.arm]
            axes.errorbar(arm.memory_bytes / 1e6, mean, yerr=ranges, fmt="o", capsize=3, color=colour, label=arm.arm)
        axes.set(xlabel="peak memory, MB", ylabel="validation perplexity", title=f"{budget:,} tokens")
    _add_legend(figure)
    return png(figure)


def _colours(study: Study) -> dict[str, Colour]:
    """Returns the colour of each arm, the same in all pictures. Twenty arms have different ones."""
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(study.file.arms) <= 10 else "tab20"]
    return {arm: colours(number % colours.N) for number, arm in enumerate(study.file.arms)}


def _add_legend(figure: Figure) -> None:
    """Adds a legend beside the panels, with every arm once, although several panels may show it."""
    shown: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(handles=list(shown.values()), labels=list(shown), loc="outside right upper", frameon=False)
