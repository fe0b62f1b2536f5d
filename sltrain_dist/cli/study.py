"""The `sltrain study` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sltrain_dist.config.paths import path_option

if TYPE_CHECKING:
    from sltrain_dist.study.study_file import Study


def study(
    file: Annotated[
        Path, typer.Argument(parser=path_option("FILE"), metavar="FILE", help="YAML file: what to compare, and how.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="section.key=value",
            help="Values that override those of the base configuration, or the study's own, such as seeds=[1,2] and "
            "study_dir=DIR.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Number of trials to run at a time.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="CPU threads of each trial. Default: $OMP_NUM_THREADS, or else an equal share of the cores.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check everything, and list the trials.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Trains several configurations on the same batches, and compares their validation perplexities.

    Every trial is an ordinary training run, in DIR/runs of the study's directory. Start the same command again to
    resume; what is done is skipped.

    Exit codes: 0 done (also with trials that diverged), 1 trials failed (the others are done), 2 configuration, 3 data,
    6 storage, 75 stopped early with everything saved.
    """
    from sltrain_dist.errors import ConfigError
    from sltrain_dist.runtime.rank_variables import rank_variables
    from sltrain_dist.study.comparison import compare, comparison_table
    from sltrain_dist.study.data_check import check_data
    from sltrain_dist.study.run_study import failure_line, run_study, study_json
    from sltrain_dist.study.study_directory import check_same_study
    from sltrain_dist.study.study_file import load_study

    loaded = load_study(file, overrides or [])
    if rank_variables()[1] > 1:
        raise ConfigError("sltrain study starts its processes itself; start it without torchrun, deepspeed or srun")
    check_same_study(loaded)
    check_data(loaded.example(next(iter(loaded.file.arms))), _say)
    if dry_run:
        _list_trials(loaded, as_json)
        return
    outcome = run_study(loaded, jobs, threads, _say)
    if as_json:
        print(json.dumps(study_json(loaded, outcome), indent=2))
    else:
        print(comparison_table(loaded, compare(loaded, outcome.results)), end="")
    for result in outcome.failed:
        print(f"error: failed: {failure_line(result)}", file=sys.stderr)
    if outcome.stopped is not None:
        print(f"stopped early with everything saved: {outcome.stopped}", file=sys.stderr)
    raise typer.Exit(int(outcome.exit_code))


def _list_trials(loaded: Study, as_json: bool) -> None:
    """Prints the trials that are known to be needed, and how far they have come."""
    from sltrain_dist.study.agenda import choose_lr, count_trials, known_trials
    from sltrain_dist.study.run_study import read_results

    results = read_results(loaded)
    trials = [
        {"run": trial.name, "arm": trial.arm, "tokens": trial.tokens, "lr": trial.lr, "seed": trial.seed}
        | {"status": results[trial.name].status.value, "tokens_done": results[trial.name].tokens}
        for trial in known_trials(loaded, results)
    ]
    if as_json:
        print(json.dumps({"study_dir": str(loaded.directory), "trials": trials}, indent=2))
        return
    for trial in trials:
        print(f"{trial['status']:<10}  {trial['run']}")
    waiting = [pair for pair in loaded.comparisons() if choose_lr(loaded, *pair, results) is None]
    if waiting:
        seeds = ", ".join(map(str, loaded.file.seeds))
        for arm, budget in waiting:
            print(f"later       {arm}, {budget:,} tokens, seeds {seeds}: with the learning rate that is chosen")
    print(f"{sum(trial['status'] == 'done' for trial in trials)} of {count_trials(loaded)} trials are done")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
