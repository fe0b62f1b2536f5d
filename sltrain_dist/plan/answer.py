"""From a question about a run to all that reports say (torch only where a replay is asked for)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sltrain_dist.config.load import to_yaml
from sltrain_dist.config.rules import check_trainable
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.files import delete_file, write_error
from sltrain_dist.memory.result import Estimate
from sltrain_dist.plan.search.combinations import Change, Progress, Row, Search, search, single_changes
from sltrain_dist.plan.search.levers import default_levers, named_levers

_FINALISTS = 3
"""Rows of a search that are replayed where that is asked for; each takes seconds to a minute."""


_DEVICES_PER_HOST = 8


@dataclass(frozen=True)
class Answer:
    """What is known of a run.

    Attributes:
        config: The run.
        ranks: Its ranks.
        device_memory: Bytes of a device, if one is named.
        estimate: What it takes.
        changes: Single changes that make it fit, cheapest first; None where it fits or no device is named.
        found: A search from it.
        rows: The rows of the search that are listed.
        rows_left_out: How many more were worth listing.
        saved: Files of their configurations, if they were saved.
        assumed: What was planned otherwise than the configuration says: values by dotted key.
    """

    config: Config
    ranks: int
    device_memory: int | None
    estimate: Estimate
    changes: Sequence[Change] | None = None
    found: Search | None = None
    rows: Sequence[Row] = ()
    rows_left_out: int = 0
    saved: Sequence[str] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def margin_bytes(self) -> int | None:
        """What the device has to spare; negative where it does not fit."""
        return None if self.device_memory is None else self.device_memory - self.estimate.device_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the device has enough."""
        margin = self.margin_bytes
        return None if margin is None else margin >= 0


def answer(config: Config, ranks: int, device_memory: int | None, *, by_replay: bool = False) -> Answer:
    """Estimates a run of this code; where it does not fit, looks for single changes that help.

    Raises:
        ConfigError: This code cannot train it, or a replay cannot show it.
    """
    check_trainable(config)
    from sltrain_dist.memory.estimate import estimate

    result = estimate(config, ranks=ranks)
    if by_replay:
        from sltrain_dist.plan.replay import replay

        # Fake tensors have no context and no allocator: what these take is as estimated.
        result = replace(replay(config, ranks=ranks), reserved_bytes=result.reserved_bytes)
    changes = None
    if device_memory is not None and result.device_bytes > device_memory:
        changes = single_changes(config, ranks, default_levers(config, ranks), estimate, device_memory)
    return Answer(config, ranks, device_memory, result, changes)


def reference_answer(config: Config, device_memory: int | None) -> Answer:
    """The same of the published code, for which no changes are looked for."""
    from sltrain_dist.plan.paper.reference import reference_estimate

    return Answer(config, 1, device_memory, reference_estimate(config))


def with_search(
    known: Answer,
    *,
    vary: Sequence[str],
    fixed: Collection[str],
    most_rows: int,
    directory: Path | None,
    by_replay: bool,
    progress: Progress | None = None,
) -> Answer:
    """Adds a search to an answer.

    Args:
        known: Where it begins.
        vary: As of :func:`sltrain_dist.plan.search.levers.named_levers`; empty for the usual levers.
        fixed: Dotted keys that the usual levers leave alone.
        most_rows: Rows that are listed.
        directory: Where their configurations are written, if anywhere.
        by_replay: Whether the first few of them are replayed.
        progress: As of :func:`sltrain_dist.plan.search.combinations.search`.

    Raises:
        ConfigError: A lever is wrong, nothing can be run, or the directory cannot be written.
    """
    from sltrain_dist.memory.estimate import estimate

    config, ranks = known.config, known.ranks
    levers = named_levers(config, ranks, vary) if vary else default_levers(config, ranks, fixed)
    found = search(config, ranks, levers, estimate, workers=len(os.sched_getaffinity(0)), progress=progress)
    if not found.rows:
        reasons = ", ".join(f"{key} ({count})" for key, count in found.refused.most_common(3))
        raise ConfigError(f"--search: none of {found.examined:,} combinations can be run, mostly because of {reasons}")
    front = found.front(known.device_memory)
    rows = front[:most_rows]
    if by_replay:
        rows = [_replayed(row, ranks) if index < _FINALISTS else row for index, row in enumerate(rows)]
    saved = [] if directory is None else save(rows, directory, ranks)
    return replace(known, found=found, rows=rows, rows_left_out=len(front) - len(rows), saved=saved)


def save(rows: Sequence[Row], directory: Path, ranks: int = 1) -> list[str]:
    """Writes every row's configuration, ready to run on so many ranks, into a directory that is made if need be.

    Each has a run directory of its own beside that of the configuration that the search began with.

    Raises:
        ConfigError: The directory cannot be written, or holds one of the files.
        StorageError: The disk is full.
    """
    paths = []
    for number, row in enumerate(rows, start=1):
        path = directory / f"plan-{number:02d}.yaml"
        config = row.config.model_copy(update={"run_dir": f"{row.config.run_dir}-{path.stem}"})
        settings = ", ".join(f"{name} {value}" for name, value in row.settings.items())
        text = (
            f"# {settings}\n# predicted: {row.device_bytes:,} bytes of the device\n"
            f"# start: {launch_line(str(path), ranks)}\n{to_yaml(config)}"
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise ConfigError(f"--save: {path} is there already; take another directory, or remove it") from None
        except OSError as error:
            delete_file(path)
            raise write_error(f"--save: cannot write {path}", error, ConfigError) from None
        paths.append(str(path))
    return paths


def launch_line(path: str, ranks: int) -> str:
    """The command that trains as a file says: on one rank, on the devices of one host, or on hosts of eight."""
    command = f"train --config {shlex.quote(path)}"
    if ranks == 1:
        return f"sltrain {command}"
    if ranks <= _DEVICES_PER_HOST or ranks % _DEVICES_PER_HOST:
        return f"torchrun --standalone --nproc-per-node {ranks} -m sltrain_dist {command}"
    hosts = f"--nnodes {ranks // _DEVICES_PER_HOST} --nproc-per-node {_DEVICES_PER_HOST}"
    return f"torchrun {hosts} --node-rank I --master-addr HOST0 --master-port 29500 -m sltrain_dist {command}"


def _replayed(row: Row, ranks: int) -> Row:
    if row.config.parallel.engine == "zero":
        return row  # DeepSpeed cannot be replayed
    from sltrain_dist.plan.replay import replay

    return replace(row, replayed_bytes=replay(row.config, ranks=ranks).peak_bytes)
