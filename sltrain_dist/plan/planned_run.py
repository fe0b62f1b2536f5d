"""A planned run: its predicted memory, what would make it fit, and a search from it (torch only for replays)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sltrain_dist.config.load import to_yaml
from sltrain_dist.config.rules import check_trainable
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.files import delete_file, failing_as
from sltrain_dist.memory.result import Estimate
from sltrain_dist.plan.search.combinations import Progress, Row, SearchResult, SingleChange, search, single_changes
from sltrain_dist.plan.search.levers import default_levers, named_levers

_WORKERS = len(os.sched_getaffinity(0))
"""Number of processes for recordings and searches: the cores that this process may use."""

_REPLAYED_ROWS = 3
"""Number of listed rows of a search that `--replay` replays; each takes seconds to a minute."""

_DEVICES_PER_HOST = 8
"""Devices of a host, for the launch command of a run on several hosts."""


@dataclass(frozen=True)
class PlannedRun:
    """A run and what the planner found about it.

    Attributes:
        config: Configuration of the run.
        ranks: World size.
        device_memory: Bytes of each device; None if no device is named.
        estimate: Predicted memory.
        changes: Single changes that make the run fit, the least slowdown first; None if it fits or no device is named.
        search: Result of a search that began with this run, if there was one.
        rows: Rows of the search that are listed, the fastest first.
        rows_left_out: Number of rows that were worth listing and are not listed.
        saved_files: Paths of the listed rows' configurations, if they were saved.
        assumed: Values by dotted key that were planned instead of the configuration's own.
    """

    config: Config
    ranks: int
    device_memory: int | None
    estimate: Estimate
    changes: Sequence[SingleChange] | None = None
    search: SearchResult | None = None
    rows: Sequence[Row] = ()
    rows_left_out: int = 0
    saved_files: Sequence[str] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def margin_bytes(self) -> int | None:
        """Bytes that the device has to spare, negative if the run does not fit; None if no device is named."""
        return None if self.device_memory is None else self.device_memory - self.estimate.device_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the run fits on the device; None if no device is named."""
        margin = self.margin_bytes
        return None if margin is None else margin >= 0


def plan_run(config: Config, ranks: int, device_memory: int | None, *, by_replay: bool = False) -> PlannedRun:
    """Estimates a run of this code and, if it does not fit, looks for single changes that make it fit.

    With `by_replay`, the peak is measured by a replay on fake tensors.

    Raises:
        ConfigError: This code cannot train with the configuration, or a replay is not possible.
    """
    check_trainable(config)
    from sltrain_dist.memory.estimate import estimate

    result = estimate(config, ranks=ranks)
    if by_replay:
        from sltrain_dist.plan.replay import replay  # not at the top: torch takes seconds to import

        # A replay has neither a CUDA context nor an allocator, so the estimate of their memory is used.
        result = replace(replay(config, ranks=ranks), reserved_bytes=result.reserved_bytes)
    changes = None
    if device_memory is not None and result.device_bytes > device_memory:
        changes = single_changes(config, ranks, default_levers(config, ranks), estimate, device_memory, _record)
    return PlannedRun(config, ranks, device_memory, result, changes)


def plan_reference_run(config: Config, device_memory: int | None) -> PlannedRun:
    """Estimates a run of the paper's published code on one device, without looking for changes."""
    from sltrain_dist.plan.paper.reference import reference_estimate

    return PlannedRun(config, 1, device_memory, reference_estimate(config))


def add_search(
    planned: PlannedRun,
    *,
    vary: Sequence[str],
    fixed: Collection[str],
    max_rows: int,
    directory: Path | None,
    by_replay: bool,
    progress: Progress | None = None,
) -> PlannedRun:
    """Searches for settings from a planned run, and returns the run with what was found.

    `vary` holds the values of `--vary`; if it is empty, the default levers are varied, except for the `fixed` dotted
    keys. At most `max_rows` rows are listed; they are saved in `directory`, and with `by_replay` the first few of them
    are replayed.

    Raises:
        ConfigError: A lever is wrong, no combination can be run, or the directory cannot be written.
        StorageError: The disk is full.
    """
    from sltrain_dist.memory.estimate import estimate

    config, ranks = planned.config, planned.ranks
    levers = named_levers(config, ranks, vary) if vary else default_levers(config, ranks, fixed)
    found = search(config, ranks, levers, estimate, workers=_WORKERS, prepare=_record, progress=progress)
    if not found.rows:
        reasons = ", ".join(f"{key} ({count})" for key, count in found.refused.most_common(3))
        raise ConfigError(f"--search: none of {found.examined:,} combinations can be run, mostly because of {reasons}")
    front = found.front(planned.device_memory)
    rows = front[:max_rows]
    if by_replay:
        from sltrain_dist.plan.replay import replay

        for index, row in enumerate(rows[:_REPLAYED_ROWS]):
            if row.config.parallel.engine != "zero":  # DeepSpeed cannot be replayed
                rows[index] = replace(row, replayed_bytes=replay(row.config, ranks=ranks).peak_bytes)
    files = [] if directory is None else save_rows(rows, directory, ranks)
    return replace(planned, search=found, rows=rows, rows_left_out=len(front) - len(rows), saved_files=files)


def _record(configs: Iterable[Config]) -> None:
    """Makes the recordings that estimates of configurations need, several in parallel."""
    from sltrain_dist.memory.estimate import recordings_of
    from sltrain_dist.memory.recording_store import record_missing
    from sltrain_dist.tracking.progress import status_line

    with status_line() as say:
        record_missing(
            (request for config in configs for request in recordings_of(config)),
            _WORKERS,
            lambda done, total: say(f"recording new parts of the model: {done} of {total}"),
        )


def save_rows(rows: Sequence[Row], directory: Path, ranks: int = 1) -> list[str]:
    """Writes the configuration of each row, ready to be trained, as `plan-01.yaml` and so on.

    Each configuration gets its own run directory, next to that of the configuration from which the search began. The
    files' directory is created if it does not exist. Returns the paths of the files.

    Raises:
        ConfigError: The directory cannot be written, or holds one of the files.
        StorageError: The disk is full.
    """
    with failing_as(f"--save: cannot write {directory}", ConfigError):
        directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, row in enumerate(rows, start=1):
        path = directory / f"plan-{number:02d}.yaml"
        config = row.config.model_copy(update={"run_dir": f"{row.config.run_dir}-{path.stem}"})
        settings = ", ".join(f"{name} {value}" for name, value in row.settings.items())
        text = (
            f"# {settings}\n# predicted: {row.device_bytes:,} bytes of the device\n"
            f"# start: {launch_command(str(path), ranks)}\n{to_yaml(config)}"
        )
        with failing_as(f"--save: cannot write {path}", ConfigError):
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                advice = "choose another directory, or remove the file"
                raise ConfigError(f"--save: {path} already exists; {advice}") from None
            except OSError:
                delete_file(path)
                raise
        paths.append(str(path))
    return paths


def launch_command(path: str, ranks: int) -> str:
    """Returns the command that trains with a configuration file: on one device, one host, or hosts of eight devices."""
    command = f"train --config {shlex.quote(path)}"
    if ranks == 1:
        return f"sltrain {command}"
    if ranks <= _DEVICES_PER_HOST or ranks % _DEVICES_PER_HOST:
        return f"torchrun --standalone --nproc-per-node {ranks} -m sltrain_dist {command}"
    hosts = f"--nnodes {ranks // _DEVICES_PER_HOST} --nproc-per-node {_DEVICES_PER_HOST}"
    return f"torchrun {hosts} --node-rank I --master-addr HOST0 --master-port 29500 -m sltrain_dist {command}"
