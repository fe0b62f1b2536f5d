"""Which trials come next, and which learning rate was chosen: pure functions of the results so far (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sltrain_dist.study.study_file import Study, Trial
from sltrain_dist.study.trial_result import TrialResult

Results = Mapping[str, TrialResult]
"""Results by the name of their trial. A trial that is not in it has not been started."""


@dataclass(frozen=True)
class Choice:
    """The learning rate that an arm's tuning trials have chosen.

    Attributes:
        lr: The learning rate of the lowest validation loss; None if all tuning trials diverged.
        at_edge: Whether it is the smallest or largest one, so that a better one may lie beyond.
    """

    lr: float | None
    at_edge: bool


def choose_lr(study: Study, arm: str, budget: int, results: Results) -> Choice | None:
    """Chooses the learning rate of an arm from its tuning trials, and from no reported trial.

    Trials that diverged are never chosen. Of equal losses, the smaller learning rate is chosen.

    Returns:
        None if a tuning trial is missing or has failed.
    """
    tuning = study.tuning(arm, budget)
    lrs = study.lrs(arm)
    if not tuning:
        return Choice(lrs[0], at_edge=False)
    found = [results.get(trial.name) for trial in tuning]
    if any(result is None or not result.is_final for result in found):
        return None
    losses = {
        result.trial.lr: result.eval_loss for result in found if result is not None and result.eval_loss is not None
    }
    if not losses:
        return Choice(None, at_edge=False)
    best = min(losses, key=lambda lr: (losses[lr], lr))
    return Choice(best, at_edge=best in (min(lrs), max(lrs)))


def reported_trials(study: Study, arm: str, budget: int, results: Results) -> list[Trial]:
    """Returns the trials that are reported for an arm; none before its learning rate is chosen."""
    choice = choose_lr(study, arm, budget, results)
    return study.reported(arm, budget, choice.lr) if choice is not None and choice.lr is not None else []


def known_trials(study: Study, results: Results) -> list[Trial]:
    """Returns all trials that are known to be needed, in the order in which they are started.

    All tuning trials come first, then the reported ones, seed by seed, so that a study that is stopped early has
    compared all arms.
    """
    tuning = [trial for arm, budget in study.comparisons() for trial in study.tuning(arm, budget)]
    reported = [reported_trials(study, arm, budget, results) for arm, budget in study.comparisons()]
    by_seed = [trials[number] for number in range(len(study.file.seeds)) for trials in reported if trials]
    return list({trial.name: trial for trial in (*tuning, *by_seed)}.values())


def count_trials(study: Study) -> int:
    """Returns the number of trials of the whole study, if no arm diverges at all its learning rates."""
    tuning = {trial.name for arm, budget in study.comparisons() for trial in study.tuning(arm, budget)}
    return len(tuning) + len(list(study.comparisons())) * len(study.file.seeds)
