"""Searches every combination of some settings for configurations that fit a device (no torch)."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from sltrain_dist.config.rules import check_fields, check_ranks, check_trainable, field_value, idle_keys
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.result import Estimate, Group
from sltrain_dist.plan.components import largest_group
from sltrain_dist.plan.search.levers import Lever, Setting
from sltrain_dist.plan.search.speed import layer_routes, update_time

Estimator = Callable[..., Estimate]
"""A function like :func:`sltrain_dist.memory.estimate.estimate`."""

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Takes the number of combinations; its context is a function that takes how many of them have been examined."""

_Candidate = tuple[Config, Mapping[str, str]]
"""A configuration that can be run, and the label of the chosen setting by the lever's name."""

_MIN_DIFFERENCE = 0.01
"""Rows whose memory or time differ by less than this share count as equal."""

_MIN_CANDIDATES_FOR_PROCESSES = 1000
"""Smallest number of candidates for which a search starts processes, which take half a second to start."""

_SIZE_KEYS = ("reparam.method", "reparam.dense_layers", "reparam.rank", "reparam.density")
"""Settings outside the section `model` that change the model's size. Only rows of the same model are compared."""


@dataclass(frozen=True, kw_only=True)
class Row(Estimate):
    """The estimate of one configuration, and its predicted time.

    The timeline contains only the peak, because thousands of timelines would take too much memory.

    Attributes:
        config: The configuration.
        settings: Label of the chosen setting by the lever's name.
        seconds: Predicted time of an update, see :mod:`sltrain_dist.plan.search.speed`.
        relative_speed: Predicted time of the configuration that the search began with, divided by `seconds`.
        replayed_bytes: Peak of a replay; None if the configuration was not replayed.
    """

    config: Config
    settings: Mapping[str, str]
    seconds: float
    relative_speed: float
    replayed_bytes: int | None = None

    @property
    def binding(self) -> Group:
        """The group of components that takes the most bytes at the peak."""
        return largest_group(self)[0]

    def fits(self, device_memory: int | None) -> bool:
        """Whether the configuration fits on a device of so many bytes; true if no device is named."""
        return device_memory is None or self.device_bytes <= device_memory

    def is_within_error(self, device_memory: int) -> bool:
        """Whether the estimate's error is too large to tell if the configuration fits on the device."""
        return abs(device_memory - self.device_bytes) < self.relative_error * self.peak_bytes


@dataclass(frozen=True)
class SingleChange:
    """One setting that makes a configuration fit: its values by dotted key, and the resulting configuration's row."""

    values: Mapping[str, Any]
    row: Row


@dataclass
class SearchResult:
    """The rows of a search, and the counts of the combinations without a row.

    Attributes:
        rows: Rows of the distinct configurations that can be run, in no particular order.
        refused: Number of combinations that cannot be run, by the key that makes them invalid.
        equal: Number of combinations that differ from another one only in settings without effect.
    """

    rows: list[Row] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    equal: int = 0

    @property
    def examined(self) -> int:
        """Number of combinations examined so far."""
        return len(self.rows) + self.refused.total() + self.equal

    def front(self, device_memory: int | None = None) -> list[Row]:
        """Returns the rows that fit and that no row of the same model beats in memory and speed, the fastest first."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            if row.fits(device_memory):
                key = (row.config.model, *(field_value(row.config, key) for key in _SIZE_KEYS))
                groups.setdefault(key, []).append(row)
        chosen = [row for rows in groups.values() for row in pareto_front(rows)]
        return sorted(chosen, key=lambda row: (row.seconds, row.device_bytes))

    @cached_property
    def smallest(self) -> Row:
        """The row that takes the least memory."""
        return min(self.rows, key=lambda row: (row.device_bytes, row.seconds))


def pareto_front(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows worth choosing between: each is slower than the one before it, and over 1 % smaller.

    Of rows that are equally fast to within 1 %, only the smallest is returned.
    """
    front: list[Row] = []
    fastest = 0.0  # seconds of the fastest row that the last one of the front replaces
    for row in sorted(rows, key=lambda row: (row.seconds, row.device_bytes)):
        if front and row.device_bytes >= (1 - _MIN_DIFFERENCE) * front[-1].device_bytes:
            continue
        if front and row.seconds <= (1 + _MIN_DIFFERENCE) * fastest:
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
    prepare: Callable[[Iterable[Config]], None] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Estimates every combination of the levers' settings, at the same global batch.

    Combinations that are invalid configurations are counted but not estimated. `prepare` is called with all distinct
    configurations, then `estimate` once for each. A large search runs in `workers` processes, for which `estimate` must
    be picklable.
    """
    found = SearchResult()
    candidates = _candidates(config, ranks, levers, found)
    if prepare is not None:
        prepare(candidate for candidate, _ in candidates)
    work = partial(evaluate, ranks=ranks, estimate=estimate, start=evaluate(config, {}, ranks, estimate))
    combinations = math.prod(len(lever.settings) for lever in levers)
    with nullcontext(_ignore) if progress is None else progress(combinations) as examined:
        examined(found.examined)
        for rows in _evaluate_all(candidates, work, workers):
            found.rows += rows
            examined(found.examined)
    return found


def _ignore(_: int) -> None:
    pass


def _candidates(config: Config, ranks: int, levers: Sequence[Lever], found: SearchResult) -> list[_Candidate]:
    """Returns the distinct configurations that can be run, and counts the other combinations in `found`."""
    keys = sorted(set[str]().union(*(lever.keys for lever in levers)))
    candidates: dict[tuple[Any, ...], _Candidate] = {}
    for combination in itertools.product(*(lever.settings for lever in levers)):
        candidate = apply_settings(config, combination)
        refusal = refused_key(candidate, ranks)
        if refusal is not None:
            found.refused[refusal] += 1
            continue
        identity = _identity(candidate, keys)
        if identity in candidates:
            found.equal += 1
            continue
        settings = {lever.name: setting.label for lever, setting in zip(levers, combination, strict=True)}
        candidates[identity] = candidate, settings
    return list(candidates.values())


def _evaluate_all(candidates: Sequence[_Candidate], work: Callable[..., Row], workers: int) -> Iterator[list[Row]]:
    """Yields the candidates' rows in order, a chunk at a time.

    A chunk is evaluated in one process. Its candidates are neighbours, so that the estimator's caches help.
    """
    size = max(1, -(-len(candidates) // (4 * workers)))
    with ExitStack() as stack:
        rows: Iterator[Row] = itertools.starmap(work, candidates)
        if workers > 1 and len(candidates) >= _MIN_CANDIDATES_FOR_PROCESSES:
            from concurrent.futures import ProcessPoolExecutor  # slow to import, and not needed for a small search
            from multiprocessing import get_context

            # A fork would be unsafe, because the caller may have threads.
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            rows = pool.map(work, *zip(*candidates, strict=True), chunksize=size)
        while chunk := list(itertools.islice(rows, size)):
            yield chunk


def single_changes(
    config: Config,
    ranks: int,
    levers: Sequence[Lever],
    estimate: Estimator,
    device_memory: int,
    prepare: Callable[[Iterable[Config]], None] | None = None,
) -> list[SingleChange]:
    """Returns the settings that make a configuration fit, each alone, the least slowdown first."""
    start = evaluate(config, {}, ranks, estimate)
    candidates = [(apply_settings(config, [setting]), lever, setting) for lever in levers for setting in lever.settings]
    candidates = [each for each in candidates if each[0] != config and refused_key(each[0], ranks) is None]
    if prepare is not None:
        prepare(candidate for candidate, _, _ in candidates)
    changes = [
        SingleChange(setting.values, evaluate(candidate, {lever.name: setting.label}, ranks, estimate, start))
        for candidate, lever, setting in candidates
    ]
    fitting = [change for change in changes if change.row.fits(device_memory)]
    return sorted(fitting, key=lambda change: (change.row.seconds, change.row.device_bytes))


def evaluate(
    config: Config, settings: Mapping[str, str], ranks: int, estimate: Estimator, start: Row | None = None
) -> Row:
    """Estimates memory and time of one configuration. `start` is the row that the search began with, if any."""
    found = estimate(config, ranks=ranks)
    seconds = update_time(config, ranks, found.comm_bytes_per_update).total
    return Row(
        **vars(replace(found, timeline=(found.peak,))),
        config=config,
        settings=settings,
        seconds=seconds,
        relative_speed=1.0 if start is None else start.seconds / seconds,
    )


def apply_settings(config: Config, settings: Iterable[Setting]) -> Config:
    """Returns the configuration with some settings changed. It is not checked."""
    changed: dict[str, dict[str, Any]] = {}
    for setting in settings:
        for key, value in setting.values.items():
            section, _, name = key.partition(".")
            changed.setdefault(section, {})[name] = value
    sections = {section: getattr(config, section).model_copy(update=values) for section, values in changed.items()}
    return config.model_copy(update=sections)


def refused_key(config: Config, ranks: int) -> str | None:
    """Returns the first key that the configuration's rules refuse on so many ranks; None if it can be run."""
    for key, _ in check_fields(config):
        return key
    try:
        check_trainable(config)
        check_ranks(config, ranks)
    except ConfigError as error:
        return str(error).split()[0].partition("=")[0]
    return None


def _identity(config: Config, keys: Sequence[str]) -> tuple[Any, ...]:
    """Returns the values of the varied keys that have an effect; equal for configurations that make the same run."""
    idle: set[str] = set(idle_keys(config))
    values: list[Any] = []
    if config.reparam.method == "sltrain" and "reparam.path" in keys:
        routes = layer_routes(config)
        values.append(routes)
        idle.add("reparam.path")
        if all(route is not None and route.path == "factored" for route in routes):
            idle.add("reparam.row_block_bytes")
    for key in keys:
        value = None if key in idle else field_value(config, key)
        values.append(repr(value) if isinstance(value, list | dict) else value)
    return tuple(values)
