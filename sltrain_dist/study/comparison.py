"""The comparison of a study's arms: means and spreads over the seeds, as rows, CSV and a table (no torch)."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sltrain_dist.study.agenda import Results, choose_lr, known_trials
from sltrain_dist.study.study_file import Study
from sltrain_dist.study.trial_result import TrialResult, TrialStatus
from sltrain_dist.tracking.console import format_bytes, format_count

_OF_RESULT = tuple(each.name for each in fields(TrialResult) if each.name not in ("trial", "reason"))
_COLUMNS = ("arm", "budget", "lr", "seed", "role", *_OF_RESULT, "run")
"""Columns of results.csv. `run` is the name of the run directory."""


@dataclass(frozen=True)
class Spread:
    """Mean and range of a quantity over the seeds."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Returns the spread of some values; None if there are none."""
        return cls(statistics.fmean(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class ArmResult:
    """The result of an arm at a budget: means over its reported trials that are done.

    Attributes:
        arm: Name of the arm.
        budget: Tokens of each trial.
        lr: The learning rate that was chosen; None before it is, and if every learning rate diverged.
        lr_at_edge: Whether the chosen learning rate is the smallest or the largest that was tried.
        seeds: Number of reported trials that are done.
        diverged: Number of reported trials that diverged; of all tuning trials, if every one of them did.
        perplexity: Validation perplexity after the last update.
        loss_difference: Validation loss minus that of the reference arm with the same seed, in nats per token.
        memory_bytes: Largest observed memory.
        predicted_memory_bytes: The planner's prediction of it, for a GPU.
        tokens_per_s: Mean throughput.
        parameters: Number of parameters of the model.
    """

    arm: str
    budget: int
    lr: float | None
    lr_at_edge: bool
    seeds: int
    diverged: int
    perplexity: Spread | None
    loss_difference: Spread | None
    memory_bytes: int | None
    predicted_memory_bytes: int | None
    tokens_per_s: float | None
    parameters: int | None


def compare(study: Study, results: Results) -> list[ArmResult]:
    """Returns the results of all arms and budgets, in the order of the study's file."""
    return [_arm_result(study, arm, budget, results) for arm, budget in study.comparisons()]


def _arm_result(study: Study, arm: str, budget: int, results: Results) -> ArmResult:
    choice = choose_lr(study, arm, budget, results)
    final = reported_results(study, arm, budget, results)
    done = [result for result in final if result.status is TrialStatus.DONE]
    diverged = len(final) - len(done)
    if choice is not None and choice.lr is None:
        diverged = len(study.tuning(arm, budget))
    return ArmResult(
        arm,
        budget,
        lr=None if choice is None else choice.lr,
        lr_at_edge=choice is not None and choice.at_edge,
        seeds=len(done),
        diverged=diverged,
        perplexity=Spread.of([result.eval_perplexity for result in done if result.eval_perplexity is not None]),
        loss_difference=_difference(study, done, budget, results) if arm != study.file.reference else None,
        memory_bytes=max((each.observed_memory_bytes for each in done if each.observed_memory_bytes), default=None),
        predicted_memory_bytes=max(
            (each.predicted_memory_bytes for each in done if each.predicted_memory_bytes), default=None
        ),
        tokens_per_s=statistics.fmean(each.tokens_per_s or 0.0 for each in done) if done else None,
        parameters=done[0].parameters if done else None,
    )


def reported_results(study: Study, arm: str, budget: int, results: Results) -> list[TrialResult]:
    """Returns the results of an arm's reported trials that are done or have diverged."""
    choice = choose_lr(study, arm, budget, results)
    if choice is None or choice.lr is None:
        return []
    found = [results.get(trial.name) for trial in study.reported(arm, budget, choice.lr)]
    return [result for result in found if result is not None and result.is_final]


def _difference(study: Study, done: Iterable[TrialResult], budget: int, results: Results) -> Spread | None:
    """Returns the spread of the loss differences to the reference arm, over the seeds that both have finished."""
    if study.file.reference is None:
        return None
    reference = reported_results(study, study.file.reference, budget, results)
    theirs = {result.trial.seed: result.eval_loss for result in reference if result.eval_loss is not None}
    return Spread.of(
        [
            result.eval_loss - theirs[result.trial.seed]
            for result in done
            if result.eval_loss is not None and result.trial.seed in theirs
        ]
    )


def trial_rows(study: Study, results: Results) -> list[dict[str, Any]]:
    """Returns a row for each trial that has ended, by the columns of results.csv.

    `role` is tuning for trials that choose a learning rate, and reported for those whose results are reported.
    """
    tuning = {trial.name for arm, budget in study.comparisons() for trial in study.tuning(arm, budget)}
    rows = []
    for trial in known_trials(study, results):
        result = results.get(trial.name)
        if result is None or result.status in (TrialStatus.NEW, TrialStatus.UNFINISHED):
            continue
        settings = (trial.arm, trial.tokens, trial.lr, trial.seed, "tuning" if trial.name in tuning else "reported")
        found = (getattr(result, name) for name in _OF_RESULT)
        rows.append(dict(zip(_COLUMNS, (*settings, *found, trial.name), strict=True)))
    return rows


def results_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of :func:`trial_rows` as CSV. Values that are not known are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def comparison_table(study: Study, arms: Sequence[ArmResult]) -> str:
    """Returns the results of the arms as a Markdown table with aligned columns, and notes below it."""
    reference = study.file.reference
    titles = ["arm", "tokens", "lr", "seeds", "perplexity", "range", "parameters", "memory", "predicted", "tokens/s"]
    if reference is not None:
        titles.insert(6, f"loss minus {reference}")
    rows = [[*_cells(arm, reference)] for arm in arms]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for cells in (titles, rules, *rows):
        padded = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join([*lines, "", *_notes(study, arms)]) + "\n"


def _cells(arm: ArmResult, reference: str | None) -> Iterable[str]:
    """Yields the cells of an arm's row."""
    unknown = "–"
    yield arm.arm
    yield f"{arm.budget:,}"
    yield unknown if arm.lr is None else f"{arm.lr:g}{'*' if arm.lr_at_edge else ''}"
    yield f"{arm.seeds}{f', {arm.diverged} diverged' if arm.diverged else ''}"
    yield f"{arm.perplexity.mean:,.2f}" if arm.perplexity else unknown
    yield f"{arm.perplexity.least:,.2f}–{arm.perplexity.most:,.2f}" if arm.perplexity else unknown
    if reference is not None:
        difference = arm.loss_difference
        yield f"{difference.mean:+.4f} ({difference.least:+.4f} … {difference.most:+.4f})" if difference else unknown
    yield unknown if arm.parameters is None else format_count(arm.parameters)
    for num_bytes in (arm.memory_bytes, arm.predicted_memory_bytes):
        yield unknown if num_bytes is None else format_bytes(num_bytes, decimal=True)
    yield unknown if arm.tokens_per_s is None else f"{arm.tokens_per_s:,.0f}"


def _notes(study: Study, arms: Sequence[ArmResult]) -> Iterable[str]:
    """Yields what a reader of the table should know."""
    seeds = ", ".join(map(str, study.file.seeds))
    yield f"Validation perplexity after the last update: mean and range over the seeds {seeds}."
    if any(study.tuning(arm.arm, arm.budget) for arm in arms):
        yield f"The learning rate of each arm was chosen with seed {study.file.tuning_seed}, which is not reported."
    if any(arm.lr_at_edge for arm in arms):
        yield "* The smallest or the largest learning rate was the best: a better one may lie beyond it."
    if any(arm.diverged and not arm.seeds for arm in arms):
        yield "Arms without a learning rate diverged at every one of them."
