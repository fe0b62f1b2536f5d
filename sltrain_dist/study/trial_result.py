"""The result of a trial, as its run directory tells it (no torch)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sltrain_dist.config.run_files import EXIT, METRICS
from sltrain_dist.errors import DataError, ExitCode
from sltrain_dist.models.count import count_parameters
from sltrain_dist.study.study_file import Trial
from sltrain_dist.tracking.jsonl import read_records


class TrialStatus(StrEnum):
    """How far a trial has come."""

    NEW = "new"
    """It has not been started."""
    UNFINISHED = "unfinished"
    """It was stopped or killed, and will be resumed."""
    DONE = "done"
    DIVERGED = "diverged"
    """Its loss became infinite or NaN, which is a result too."""
    FAILED = "failed"
    """It ended with an error, and will be tried again when the study is started again."""


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial. What its run directory does not tell (yet) is None.

    Attributes:
        trial: The trial.
        status: How far it has come.
        reason: Why its last process ended, according to exit.json.
        exit_code: The exit code of its last process.
        step: Number of updates made.
        tokens: Number of non-padding tokens trained on.
        initial_eval_loss: Validation loss before the first update, in nats per token.
        eval_loss: Validation loss after the last update, in nats per token.
        eval_perplexity: Validation perplexity after the last update.
        eval_tokens: Number of evaluation tokens.
        parameters: Number of parameters of the model.
        observed_memory_bytes: On CUDA the allocator's peak, otherwise the peak of live tensors in one update.
        predicted_memory_bytes: The planner's prediction of the peak on a GPU.
        peak_memory_bytes: On CUDA the allocator's peak, otherwise the process's peak resident size.
        tokens_per_s: Median over the log lines.
        elapsed_s: Seconds spent on the run.
    """

    trial: Trial
    status: TrialStatus
    reason: str = ""
    exit_code: int | None = None
    step: int = 0
    tokens: int = 0
    initial_eval_loss: float | None = None
    eval_loss: float | None = None
    eval_perplexity: float | None = None
    eval_tokens: int | None = None
    parameters: int = 0
    observed_memory_bytes: int | None = None
    predicted_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    tokens_per_s: float | None = None
    elapsed_s: float | None = None

    @property
    def is_final(self) -> bool:
        """Whether the trial need not be started again."""
        return self.status in (TrialStatus.DONE, TrialStatus.DIVERGED)


def read_result(trial: Trial) -> TrialResult:
    """Reads the result of a trial from its run directory."""
    if not (trial.run_dir / EXIT).exists():
        return TrialResult(trial, TrialStatus.NEW)
    lines = metric_lines(trial.run_dir)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    last = training[-1] if training else {"step": 0, "tokens": 0}
    final = evaluations[-1] if evaluations and evaluations[-1]["step"] == last["step"] > 0 else {}
    ending = _read_exit(trial.run_dir)
    status = _status(ending.get("code"), final)
    return TrialResult(
        trial,
        status,
        reason=str(ending.get("reason", "")),
        exit_code=ending.get("code"),
        step=last["step"],
        tokens=last["tokens"],
        initial_eval_loss=next((float(line["eval_loss"]) for line in evaluations if line["step"] == 0), None),
        eval_loss=float(final["eval_loss"]) if status is TrialStatus.DONE else None,
        eval_perplexity=float(final["eval_perplexity"]) if status is TrialStatus.DONE else None,
        eval_tokens=final["eval_tokens"] if status is TrialStatus.DONE else None,
        parameters=count_parameters(trial.config.model, trial.config.reparam).total,
        observed_memory_bytes=_largest(training, "observed_memory_bytes"),
        predicted_memory_bytes=_largest(training, "predicted_memory_bytes"),
        peak_memory_bytes=_largest(training, "peak_memory_bytes"),
        tokens_per_s=statistics.median(line["tokens_per_s"] for line in training) if training else None,
        elapsed_s=last.get("elapsed_s"),
    )


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a run's metrics.jsonl, parsed.

    Raises:
        DataError: A line is damaged.
    """
    try:
        return read_records(run_dir / METRICS)
    except FileNotFoundError:
        return []
    except DataError as error:
        raise DataError(f"{error}; delete {run_dir}, so that the trial is run again") from None


def check_same_evaluation(results: Iterable[TrialResult]) -> None:
    """Checks that all finished trials were evaluated on the same number of tokens.

    Raises:
        DataError: They were not: the files of eval.source have changed.
    """
    done = [result for result in results if result.status is TrialStatus.DONE]
    for result in done:
        if result.eval_tokens != done[0].eval_tokens:
            raise DataError(
                f"{result.trial.name} was evaluated on {result.eval_tokens:,} tokens, and {done[0].trial.name} on "
                f"{done[0].eval_tokens:,}: the evaluation data have changed since, so these results cannot be "
                "compared; restore the data, or choose another study_dir"
            )


def _status(code: Any, final: dict[str, Any]) -> TrialStatus:
    if code is None or code == ExitCode.STOPPED_EARLY:  # null: the process is running, or was killed
        return TrialStatus.UNFINISHED
    if code == ExitCode.DIVERGED:
        return TrialStatus.DIVERGED
    if code != ExitCode.DONE or not final:
        return TrialStatus.FAILED
    return TrialStatus.DONE if math.isfinite(float(final["eval_loss"])) else TrialStatus.DIVERGED


def _read_exit(run_dir: Path) -> dict[str, Any]:
    try:
        values = json.loads((run_dir / EXIT).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _largest(lines: list[dict[str, Any]], key: str) -> int | None:
    return max((int(line[key]) for line in lines if key in line), default=None)
