"""Looks for configurations that fit (no torch): every combination of some levers, all else fixed."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from sltrain_dist.config.rules import (
    check_fields,
    check_ranks,
    check_trainable,
    field_value,
    idle_keys,
)
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.result import Estimate, Group, Phase
from sltrain_dist.plan.reports.labels import binding
from sltrain_dist.plan.search.levers import Lever, Setting
from sltrain_dist.plan.search.speed import layer_plans, update_time

Estimator = Callable[..., Estimate]
"""As :func:`sltrain_dist.memory.estimate.estimate`."""

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Takes a number of things to do, and gives what takes the number of those done."""

_Candidate = tuple[Config, Mapping[str, str]]
"""A configuration that can be run, and what was chosen in it, by the levers' names."""

_NEAR = 0.01
"""A row that is worse in one figure must be better in the other by more than this share to be worth a line."""

_WORTH_A_PROCESS = 1000
"""Configurations from which on processes are started for a search: these take half a second to start."""

_SIZE_KEYS = ("reparam.method", "reparam.rank", "reparam.density")
"""Settings, beside the section model, that make another model: rows are compared with those of the same model only."""


@dataclass(frozen=True)
class Row:
    """What is known of one configuration.

    Attributes:
        config: It.
        settings: What was chosen, by the levers' names.
        peak_bytes, device_bytes, parameters, flops_per_token, comm_bytes_per_update: As of :class:`Estimate`.
        phase, where: Of the peak.
        binding: The component that takes most at the peak.
        relative_error: Of the estimate's peak.
        seconds: Predicted time of an update, see :mod:`sltrain_dist.plan.search.speed`.
        relative_speed: That of the configuration that the search began with, divided by `seconds`.
        replayed_bytes: The peak by replay, where there was one.
    """

    config: Config
    settings: Mapping[str, str]
    peak_bytes: int
    device_bytes: int
    parameters: int
    flops_per_token: int
    comm_bytes_per_update: int
    phase: Phase
    where: str
    binding: Group
    relative_error: float
    seconds: float
    relative_speed: float = 1.0
    replayed_bytes: int | None = None

    def fits(self, device_memory: int | None) -> bool:
        """Whether a device has enough; any has, where none is named."""
        return device_memory is None or self.device_bytes <= device_memory

    def is_close(self, device_memory: int) -> bool:
        """Whether the estimate's error is larger than its distance to what the device has, on either side."""
        return abs(device_memory - self.device_bytes) < self.relative_error * self.peak_bytes


@dataclass(frozen=True)
class Change:
    """One setting that makes a configuration fit: its values by dotted key, and what comes of it."""

    values: Mapping[str, Any]
    row: Row


@dataclass
class Search:
    """What a search found.

    Attributes:
        start: The configuration that it began with.
        rows: All that can be run, in no order.
        refused: How many cannot, by the key that was refused.
        equal: How many differ from another one only in settings that have no effect there, or that choose the same.
    """

    start: Row
    rows: list[Row] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    equal: int = 0

    @property
    def examined(self) -> int:
        """All combinations."""
        return len(self.rows) + self.refused.total() + self.equal

    def front(self, device_memory: int | None = None) -> list[Row]:
        """The rows that fit and that no other one beats in both memory and speed, the fastest first."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            if row.fits(device_memory):
                key = (row.config.model, *(field_value(row.config, key) for key in _SIZE_KEYS))
                groups.setdefault(key, []).append(row)
        chosen = [row for rows in groups.values() for row in pareto(rows)]
        return sorted(chosen, key=lambda row: (row.seconds, row.device_bytes))

    @cached_property
    def smallest(self) -> Row:
        """The row that takes least."""
        return min(self.rows, key=lambda row: (row.device_bytes, row.seconds))


def pareto(rows: Iterable[Row]) -> list[Row]:
    """Rows worth choosing between: each slower than the one before, and over 1 % smaller.

    Of rows that are about equally fast, the smallest stands for all.
    """
    front: list[Row] = []
    fastest = 0.0  # of those that the last row stands for
    for row in sorted(rows, key=lambda row: (row.seconds, row.device_bytes)):
        if front and row.device_bytes >= (1 - _NEAR) * front[-1].device_bytes:
            continue
        if front and row.seconds <= (1 + _NEAR) * fastest:
            front[-1] = row
        else:
            front.append(row)
            fastest = row.seconds
    return front


def search(
    config: Config,
    ranks: int,
    levers: Sequence[Lever],
    estimate: Estimator,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Search:
    """Estimates every combination of the levers' settings.

    The global batch is that of `config`; combinations that the configuration's own rules refuse are counted, not
    estimated.

    Args:
        config: What everything else is taken from.
        ranks: Number of ranks.
        levers: What is varied.
        estimate: Called once for each distinct configuration that can be run.
        workers: Processes that share the work where there is much of it; `estimate` must be picklable then.
        progress: Opened with the number of combinations, and called with how many have been examined.
    """
    found = Search(start=evaluate(config, ranks, {}, estimate))
    combinations = math.prod(len(lever.settings) for lever in levers)
    with nullcontext(_silent) if progress is None else progress(combinations) as examined:
        candidates = _candidates(config, ranks, levers, found)
        examined(found.examined)
        for rows in _evaluate_all(candidates, ranks, estimate, workers):
            found.rows += [replace(row, relative_speed=found.start.seconds / row.seconds) for row in rows]
            examined(found.examined)
    return found


def _candidates(config: Config, ranks: int, levers: Sequence[Lever], found: Search) -> list[_Candidate]:
    """Every combination that can be run and has an effect of its own; the others are counted in `found`."""
    keys = sorted(set[str]().union(*(lever.keys for lever in levers)))
    seen: set[tuple[Any, ...]] = set()
    candidates: list[_Candidate] = []
    for combination in itertools.product(*(lever.settings for lever in levers)):
        candidate = apply(config, combination)
        refusal = refused(candidate, ranks)
        if refusal is not None:
            found.refused[refusal] += 1
            continue
        identity = _identity(candidate, keys)
        if identity in seen:
            found.equal += 1
            continue
        seen.add(identity)
        settings = {lever.name: setting.label for lever, setting in zip(levers, combination, strict=True)}
        candidates.append((candidate, settings))
    return candidates


def _silent(_: int) -> None:
    pass


def _evaluate_all(
    candidates: Sequence[_Candidate], ranks: int, estimate: Estimator, workers: int
) -> Iterator[list[Row]]:
    """Yields the rows in their order, some at a time: neighbours, which share most of what an estimator remembers."""
    size = max(1, -(-len(candidates) // (4 * workers)))
    chunks = [candidates[first : first + size] for first in range(0, len(candidates), size)]
    work = partial(_evaluate_chunk, ranks=ranks, estimate=estimate)
    if workers == 1 or len(candidates) < _WORTH_A_PROCESS:
        yield from map(work, chunks)
        return
    from concurrent.futures import ProcessPoolExecutor  # imported here, for the many plans without a search
    from multiprocessing import get_context

    # Not forked: the caller may have threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, chunks)


def _evaluate_chunk(chunk: Sequence[_Candidate], ranks: int, estimate: Estimator) -> list[Row]:
    return [evaluate(candidate, ranks, settings, estimate) for candidate, settings in chunk]


def single_changes(
    config: Config, ranks: int, levers: Sequence[Lever], estimate: Estimator, device_memory: int
) -> list[Change]:
    """Settings of one lever each that make a configuration fit, the least slowdown first."""
    start = evaluate(config, ranks, {}, estimate)
    changes = []
    for lever in levers:
        for setting in lever.settings:
            candidate = apply(config, [setting])
            if candidate == config or refused(candidate, ranks) is not None:
                continue
            row = evaluate(candidate, ranks, {lever.name: setting.label}, estimate)
            if row.fits(device_memory):
                row = replace(row, relative_speed=start.seconds / row.seconds)
                changes.append(Change(setting.values, row))
    return sorted(changes, key=lambda change: (change.row.seconds, change.row.device_bytes))


def evaluate(config: Config, ranks: int, settings: Mapping[str, str], estimate: Estimator) -> Row:
    """Estimates one configuration."""
    estimated = estimate(config, ranks=ranks)
    peak = estimated.peak
    return Row(
        config=config,
        settings=settings,
        peak_bytes=estimated.peak_bytes,
        device_bytes=estimated.device_bytes,
        parameters=estimated.parameters,
        flops_per_token=estimated.flops_per_token,
        comm_bytes_per_update=estimated.comm_bytes_per_update,
        phase=peak.phase,
        where=peak.where,
        binding=binding(estimated)[0],
        relative_error=estimated.relative_error,
        seconds=update_time(config, ranks, estimated.comm_bytes_per_update).total,
    )


def apply(config: Config, settings: Iterable[Setting]) -> Config:
    """The configuration with some settings; their values have been checked, their combination has not."""
    changed: dict[str, dict[str, Any]] = {}
    for setting in settings:
        for key, value in setting.values.items():
            section, _, name = key.partition(".")
            changed.setdefault(section, {})[name] = value
    sections = {section: getattr(config, section).model_copy(update=values) for section, values in changed.items()}
    return config.model_copy(update=sections)


def refused(config: Config, ranks: int) -> str | None:
    """The first key that the configuration's rules refuse on so many ranks, or None."""
    for key, _ in check_fields(config):
        return key
    try:
        check_trainable(config)
        check_ranks(config, ranks)
    except ConfigError as error:
        return str(error).split()[0].partition("=")[0]
    return None


def _identity(config: Config, keys: Sequence[str]) -> tuple[Any, ...]:
    """What of the varied settings has an effect: equal for configurations that only look different."""
    idle: set[str] = set(idle_keys(config))
    values: list[Any] = []
    if config.reparam.method == "sltrain" and "reparam.path" in keys:
        plans = layer_plans(config)
        values.append(plans)
        idle.add("reparam.path")
        if all(plan.path == "factored" for plan in plans):
            idle.add("reparam.row_block_bytes")
    for key in keys:
        value = None if key in idle else field_value(config, key)
        values.append(repr(value) if isinstance(value, list | dict) else value)
    return tuple(values)
