"""The `sltrain plan` command, which checks the options and prints or writes the reports.

Modules that are slow to import are imported where they are needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sltrain_dist.config.paths import path_option
from sltrain_dist.errors import ConfigError
from sltrain_dist.files import delete_file, failing_as

if TYPE_CHECKING:
    from sltrain_dist.plan.planned_run import PlannedRun

_DEFAULT_ROWS = 12
"""Largest number of rows that a search lists without `--rows`."""

_MIN_COMBINATIONS_FOR_PROGRESS = 200
"""Smallest number of combinations for which a search shows its progress; fewer take less than a second."""

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")
"""Suffixes of the file formats of `--plot`."""


def _path(name: str, metavar: str, description: str) -> Any:
    return typer.Option(name, parser=path_option(name), metavar=metavar, help=description)


def plan(
    config: Annotated[Path, _path("--config", "FILE", "YAML file, as for training.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Values that override the file's.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=2**17, help="Number of ranks, one per device.")] = 1,
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
    rows: Annotated[int | None, typer.Option(min=1, help="With --search: maximum number of rows to list (12).")] = None,
    save: Annotated[
        Path | None, _path("--save", "DIR", "With --search: directory for the listed rows' configurations.")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Run a real update on tensors without data instead of playing recordings.")
    ] = False,
    html: Annotated[Path | None, _path("--html", "FILE", "Write a page to this file.")] = None,
    plot: Annotated[Path | None, _path("--plot", "FILE", "Write a picture to this file: .png, .svg or .pdf.")] = None,
    accounting: Annotated[
        Literal["paper"] | None,
        typer.Option(help="paper: the arithmetic of the paper's Table 2, for all five methods."),
    ] = None,
    implementation: Annotated[
        Literal["ours", "reference"], typer.Option(help="reference: the memory of the published code.")
    ] = "ours",
) -> None:
    """Predicts the memory of a run, and searches for settings that fit a device.

    The prediction is for one rank, by component and phase. It needs no GPU. The exit code is 0 whether or not the run
    fits into --device-memory, and 2 if an option or the configuration is wrong.
    """
    from sltrain_dist.config.load import load_config, override_keys
    from sltrain_dist.config.rules import check_ranks, without_effect
    from sltrain_dist.memory import recording_store
    from sltrain_dist.plan.planned_run import add_search, plan_reference_run, plan_run
    from sltrain_dist.plan.search.levers import for_one_device

    reference = implementation == "reference"
    searching = {"--search": search, "--replay": replay}
    if accounting:
        given = {"--device-memory": device_memory, "--html": html, "--plot": plot, **searching}
        given |= {"--implementation": reference, "--ranks": ranks > 1}
        _refuse(given, "--accounting paper only counts the memory of a model")
    if reference:
        given = {**searching, f"--ranks {ranks}": ranks > 1}
        _refuse(given, "--implementation reference emulates one configuration on one GPU")
    for option, value in {"--vary": vary, "--save": save, "--rows": rows}.items():
        if value and not search:
            raise ConfigError(f"{option} needs --search")
    if plot is not None and plot.suffix.lower() not in _PLOT_SUFFIXES:
        raise ConfigError(f"--plot {plot}: the suffix must be one of {', '.join(_PLOT_SUFFIXES)}")
    loaded = load_config(config, overrides or [])
    if accounting:
        from sltrain_dist.plan.reports.json_report import accounting_json

        result = accounting_json(loaded)
        if as_json:
            print(json.dumps(result, indent=2))
        else:
            from sltrain_dist.plan.reports.terminal import print_accounting

            print_accounting(result)
        return
    for warning in without_effect(loaded):
        print(f"note: {warning}", file=sys.stderr)
    fixed, configured = override_keys(overrides or []), loaded.parallel.engine
    if ranks == 1 and "parallel.engine" not in fixed:
        loaded = for_one_device(loaded)
    check_ranks(loaded, ranks)
    device = None
    if device_memory is not None:
        from sltrain_dist.plan.device_memory import parse_device_memory

        device = parse_device_memory(device_memory)
    if reference:
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
    for problem in recording_store.problems:
        print(f"note: recordings cannot be saved in {problem}; the next plan makes them again", file=sys.stderr)
    _report(planned, html, plot, as_json)


def _refuse(options: Mapping[str, object], reason: str) -> None:
    """Raises ConfigError if any of these options was given."""
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{reason}; leave out {', '.join(given)}")


@contextmanager
def _show_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a search on standard error, unless the search is short."""
    if total < _MIN_COMBINATIONS_FOR_PROGRESS:
        yield lambda done: None
        return
    from sltrain_dist.tracking.progress import progress_bar

    with progress_bar("searching", total) as report:
        yield lambda done: report(done, "combinations examined")


def _report(planned: PlannedRun, html: Path | None, plot: Path | None, as_json: bool) -> None:
    """Writes the requested files, then prints JSON or text."""
    if html is not None:
        from sltrain_dist.plan.reports.page import render_page

        _write("--html", html, render_page(planned).encode())
    if plot is not None:
        from sltrain_dist.plan.reports.chart import draw_plot

        _write("--plot", plot, draw_plot(planned, plot.suffix[1:]))
    if as_json:
        from sltrain_dist.plan.reports.json_report import plan_json

        print(json.dumps(plan_json(planned), indent=2))
    else:
        from sltrain_dist.plan.reports.terminal import print_plan

        print_plan(planned)


def _write(option: str, path: Path, content: bytes) -> None:
    """Writes a report's file, and removes it if it cannot be written completely."""
    with failing_as(f"{option}: cannot write {path}", ConfigError):
        try:
            path.write_bytes(content)
        except OSError:
            delete_file(path)
            raise
