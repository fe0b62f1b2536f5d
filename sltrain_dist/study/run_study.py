"""Running a study: its missing trials, then its results (no torch)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sltrain_dist.errors import ExitCode
from sltrain_dist.files import write_whole, writing
from sltrain_dist.runtime.stop import StopRequest
from sltrain_dist.study.agenda import count_trials, known_trials
from sltrain_dist.study.comparison import compare, comparison_table, results_csv, trial_rows
from sltrain_dist.study.parent_run import ParentRun
from sltrain_dist.study.plots import draw_losses, draw_memory
from sltrain_dist.study.study_directory import claimed
from sltrain_dist.study.study_file import Study
from sltrain_dist.study.trial_process import OUTPUT, Resources, TrialPool
from sltrain_dist.study.trial_result import TrialResult, TrialStatus, check_same_evaluation, read_result

RESULTS, TABLE, LOSS_PLOT, MEMORY_PLOT = "results.csv", "table.md", "loss.png", "memory.png"
"""Files that a study writes into its directory."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class StudyOutcome:
    """How a study ended.

    Attributes:
        results: Results by the name of their trial.
        stopped: Why it was stopped early; None if it was not.
    """

    results: dict[str, TrialResult]
    stopped: str | None

    @property
    def failed(self) -> list[TrialResult]:
        """Results of the trials that ended with an error."""
        return [result for result in self.results.values() if result.status is TrialStatus.FAILED]

    @property
    def exit_code(self) -> ExitCode:
        """75 if trials are left to be resumed, 1 if some have failed, otherwise 0."""
        unfinished = any(result.status is TrialStatus.UNFINISHED for result in self.results.values())
        if self.stopped is not None or unfinished:
            return ExitCode.STOPPED_EARLY
        return ExitCode.UNEXPECTED if self.failed else ExitCode.DONE


def run_study(study: Study, jobs: int, threads: int | None, say: Say) -> StudyOutcome:
    """Runs the trials of a study that are missing, and writes its results.

    Args:
        study: The study.
        jobs: Number of trials to run at a time.
        threads: Number of CPU threads of each trial. None: $OMP_NUM_THREADS, or an equal share of the cores.
        say: Receives lines of progress.

    Raises:
        ConfigError: The directory is in use, or belongs to another study.
        DataError: The trials were not evaluated on the same data.
        StorageError: Something cannot be written.
    """
    with claimed(study) as descriptor, _stop_request(study.directory) as stop:
        results = read_results(study)
        missing = [trial for trial in known_trials(study, results) if not results[trial.name].is_final]
        if not missing:
            write_results(study, results)
            write_plots(study, results)
            return StudyOutcome(results, None)
        parent, finished, stopped = ParentRun(study, say), False, None
        try:
            resources = Resources(jobs, _threads(jobs) if threads is None else threads, descriptor)
            with TrialPool(resources, parent.adjust).open() as pool:
                stopped = _train(study, pool, results, stop, say)
            files = [*write_results(study, results), *write_plots(study, results)]
            parent.record(compare(study, results), files)
            outcome = StudyOutcome(results, stopped)
            finished = outcome.exit_code is ExitCode.DONE
        finally:
            where = parent.close("FINISHED" if finished else "FAILED" if stopped is None else "KILLED")
        stop.acknowledge()
        if where is not None:
            say(f"look at the study: {where}")
        return outcome


def read_results(study: Study) -> dict[str, TrialResult]:
    """Reads the results of all trials that are known to be needed, as far as they have come."""
    results: dict[str, TrialResult] = {}
    while missing := [trial for trial in known_trials(study, results) if trial.name not in results]:
        # Tuning trials that are done make reported ones known.
        results |= {trial.name: read_result(trial) for trial in missing}
    return results


def write_results(study: Study, results: dict[str, TrialResult]) -> list[Path]:
    """Writes results.csv and the table, and returns their paths.

    Raises:
        DataError: The trials were not evaluated on the same data.
        StorageError: They cannot be written.
    """
    check_same_evaluation(results.values())
    contents = {
        RESULTS: results_csv(trial_rows(study, results)),
        TABLE: comparison_table(study, compare(study, results)),
    }
    return _write(study, contents)


def write_plots(study: Study, results: dict[str, TrialResult]) -> list[Path]:
    """Draws the pictures and returns their paths. Before a reported trial is done, there is nothing to draw.

    Raises:
        StorageError: They cannot be written.
    """
    arms = compare(study, results)
    if not any(arm.seeds for arm in arms):
        return []
    return _write(study, {LOSS_PLOT: draw_losses(study, results), MEMORY_PLOT: draw_memory(study, arms)})


def study_json(study: Study, outcome: StudyOutcome) -> dict[str, Any]:
    """Returns the results of a study for `--json`."""
    return {
        "study_dir": str(study.directory),
        "exit_code": int(outcome.exit_code),
        "arms": [asdict(arm) for arm in compare(study, outcome.results)],
        "trials": trial_rows(study, outcome.results),
        "failed": [failure_line(result) for result in outcome.failed],
    }


def failure_line(result: TrialResult) -> str:
    """Says which trial failed, and why."""
    where = result.trial.run_dir / OUTPUT
    return f"{result.trial.name}: exit code {result.exit_code}: {result.reason} (more in {where})"


def _train(study: Study, pool: TrialPool, results: dict[str, TrialResult], stop: StopRequest, say: Say) -> str | None:
    """Runs trials until none is left or a stop is requested. Returns the reason of the stop, or None."""
    started: set[str] = set()
    stopped: str | None = None
    while True:
        if stopped is None and (stopped := stop.reason()) is not None:
            say(f"{stopped}: {len(pool.names)} running trials save and end")
            pool.stop()
        for trial in known_trials(study, results) if stopped is None else ():
            result = results.setdefault(trial.name, TrialResult(trial, TrialStatus.NEW))
            if trial.name in started or result.is_final:
                continue
            if pool.is_full:
                break
            started.add(trial.name)
            say(f"{'resumed' if result.status is TrialStatus.UNFINISHED else 'started'}: {trial}")
            pool.start(trial)
        if not pool.names:
            return stopped
        for trial, code in pool.ended():
            results[trial.name] = result = _ended(read_result(trial), code, was_stopped=stopped is not None)
            num_final = sum(each.is_final for each in results.values())
            say(f"{num_final} of {count_trials(study)}: {trial}: {_describe(result)}")
            write_results(study, results)


def _ended(result: TrialResult, code: int, *, was_stopped: bool) -> TrialResult:
    """Completes the result of a trial whose process has just ended, which may have been killed without a word."""
    if result.is_final or result.status is TrialStatus.FAILED or code == ExitCode.STOPPED_EARLY:
        return result
    if code < 0 and was_stopped:  # it had not got as far as handling the signal
        return replace(result, status=TrialStatus.UNFINISHED)
    reason = f"its process was killed by signal {-code}" if code < 0 else "its process ended without saying why"
    return replace(result, status=TrialStatus.FAILED, exit_code=code, reason=reason)


def _describe(result: TrialResult) -> str:
    if result.status is TrialStatus.DONE:
        return f"perplexity {result.eval_perplexity:,.2f} after {result.tokens:,} tokens, {result.elapsed_s:,.0f} s"
    if result.status is TrialStatus.FAILED:
        return f"failed with exit code {result.exit_code}: {result.reason}"
    return f"{result.status.value}: {result.reason}"


@contextmanager
def _stop_request(directory: Path) -> Iterator[StopRequest]:
    stop = StopRequest(directory)
    stop.install()
    try:
        yield stop
    finally:
        stop.restore()


def _threads(jobs: int) -> int:
    """Returns the number of threads of a trial: as set by the user, or an equal share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, len(os.sched_getaffinity(0)) // jobs)


def _write(study: Study, contents: Mapping[str, str | bytes]) -> list[Path]:
    paths = [study.directory / name for name in contents]
    with writing(f"study_dir = {study.directory}"):
        for path, content in zip(paths, contents.values(), strict=True):
            write_whole(path, content)
    return paths
