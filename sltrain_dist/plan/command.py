"""The `sltrain plan` command: checks the options and prints or writes the reports.

Modules that are slow to import are imported where they are needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sltrain_dist.config.paths import path_option
from sltrain_dist.errors import ConfigError

if TYPE_CHECKING:
    from sltrain_dist.config.schema import Config


_DEFAULT_ROWS = 12
"""Largest number of rows that a search lists without `--rows`."""

_MIN_COMBINATIONS_FOR_PROGRESS = 200
"""Number of combinations from which on a search shows its progress; fewer take less than a second."""


class Accounting(StrEnum):
    """Published memory accounting that `--accounting` can follow."""

    paper = "paper"


class Implementation(StrEnum):
    """Implementation of the method whose memory is predicted."""

    ours = "ours"
    reference = "reference"


def plan(
    config: Annotated[
        Path, typer.Option(parser=path_option("--config"), metavar="FILE", help="YAML file, as for training.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Values that win over the file's.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=2**17, help="Number of ranks, one a device.")] = 1,
    device_memory: Annotated[
        str | None,
        typer.Option(help="Memory of one device: 24GiB, 80GB, or a GPU such as 'RTX 4090' (nvidia-smi's names)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Try combinations of settings; list those that are small and fast.")
    ] = False,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="With --search: what to vary instead of the defaults, section.key=value,value,… or the name of a "
            "default lever, such as engine; may be repeated."
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="With --search: most rows to list (12).")] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            parser=path_option("--save"),
            metavar="DIR",
            help="With --search: directory for the listed rows' configurations.",
        ),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Run a real update on tensors without data instead of playing recordings.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(parser=path_option("--html"), metavar="FILE", help="Write a page to this file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=path_option("--plot"), metavar="FILE", help="Write a picture to this file: .png, .svg or .pdf."
        ),
    ] = None,
    accounting: Annotated[
        Accounting | None, typer.Option(help="paper: the arithmetic of the paper's Table 2, for all five methods.")
    ] = None,
    implementation: Annotated[
        Implementation, typer.Option(help="reference: how the published code uses memory.")
    ] = Implementation.ours,
) -> None:
    """Predicts the memory of a run, and searches for settings that fit a device.

    The prediction is for one rank, by component and phase. It needs no GPU. The exit code is 0 whether or not the run
    fits into --device-memory, and 2 if an option or the configuration is wrong.
    """
    from sltrain_dist.config.load import load_config, override_keys
    from sltrain_dist.config.rules import check_ranks, without_effect
    from sltrain_dist.memory import store
    from sltrain_dist.plan.device_memory import parse_device_memory
    from sltrain_dist.plan.planned_run import add_search, plan_reference_run, plan_run
    from sltrain_dist.plan.search.levers import for_one_device

    _check_options(
        accounting=accounting,
        reference=implementation is Implementation.reference,
        ranks=ranks,
        search=search,
        replay=replay,
        estimating={"--device-memory": device_memory, "--html": html, "--plot": plot},
        searching={"--vary": vary, "--save": save, "--rows": rows},
    )
    loaded = load_config(config, overrides or [])
    if accounting:
        _print_accounting(loaded, as_json)
        return
    for warning in without_effect(loaded):
        print(f"note: {warning}", file=sys.stderr)
    fixed, configured = override_keys(overrides or []), loaded.parallel.engine
    if ranks == 1 and "parallel.engine" not in fixed:
        loaded = for_one_device(loaded)
    check_ranks(loaded, ranks)
    device = None if device_memory is None else parse_device_memory(device_memory)
    if implementation is Implementation.reference:
        planned = plan_reference_run(loaded, device)
    else:
        planned = plan_run(loaded, ranks, device, by_replay=replay and not search)
        if loaded.parallel.engine != configured:
            planned = replace(planned, assumed={"parallel.engine": loaded.parallel.engine})
    if search:
        planned = add_search(
            planned,
            vary=vary or [],
            fixed=fixed,
            max_rows=rows or _DEFAULT_ROWS,
            directory=save,
            by_replay=replay,
            progress=_show_progress,
        )
    for problem in store.problems:
        print(f"note: recordings cannot be kept in {problem}: the next plan makes them anew", file=sys.stderr)
    if html is not None:
        from sltrain_dist.plan.reports.page import write_page

        write_page(planned, html)
    if plot is not None:
        from sltrain_dist.plan.reports.plot import write_plot

        write_plot(planned, plot)
    if as_json:
        from sltrain_dist.plan.reports.json_report import plan_json

        print(json.dumps(plan_json(planned), indent=2))
    else:
        from sltrain_dist.plan.reports.terminal import print_plan

        print_plan(planned)


@contextmanager
def _show_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows on standard error how far a search is, unless it is over in a moment."""
    if total < _MIN_COMBINATIONS_FOR_PROGRESS:
        yield lambda done: None
        return
    from sltrain_dist.tracking.progress import progress_bar

    with progress_bar("searching", total) as report:
        yield lambda done: report(done, "combinations examined")


def _check_options(
    *,
    accounting: Accounting | None,
    reference: bool,
    ranks: int,
    search: bool,
    replay: bool,
    estimating: dict[str, object],
    searching: dict[str, object],
) -> None:
    """Raises ConfigError for options that do not go together."""
    given = [name for name, value in {**estimating, "--search": search, "--replay": replay}.items() if value]
    if accounting and (given or reference or ranks > 1):
        others = ", ".join([*given, *(["--implementation"] if reference else []), *(["--ranks"] if ranks > 1 else [])])
        raise ConfigError(f"--accounting paper is arithmetic about a model alone; leave out {others}")
    if reference and (search or replay or ranks > 1):
        wrong = "--search" if search else "--replay" if replay else f"--ranks {ranks}"
        raise ConfigError(f"--implementation reference emulates one configuration on one GPU; leave out {wrong}")
    alone = next((name for name, value in searching.items() if value and not search), None)
    if alone:
        raise ConfigError(f"{alone} goes with --search")


def _print_accounting(config: Config, as_json: bool) -> None:
    from sltrain_dist.plan.paper.accounting import paper_memory, paper_table

    table = paper_table(config.model, config.reparam)
    memory = paper_memory(config.model, config.reparam)
    if as_json:
        from sltrain_dist.plan.reports.json_report import accounting_json

        print(json.dumps(accounting_json(memory, table), indent=2))
    else:
        from sltrain_dist.plan.reports.terminal import print_accounting

        print_accounting(memory, table)
