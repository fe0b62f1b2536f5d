"""train/observers/memory_watch.py: predicted against observed memory, and who is to blame."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.device_overhead import WORKSPACE_BYTES
from sltrain_dist.memory.result import Estimate, Point
from sltrain_dist.models.build import build_model
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.plan.follow import follow
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.tracking.console import format_bytes
from sltrain_dist.train.build import build_engine, predict
from sltrain_dist.train.dry_run import made_up_rows
from sltrain_dist.train.observers.memory_watch import MemoryWatch
from sltrain_dist.train.observers.observer import MEASURED_UPDATE, Update
from sltrain_dist.train.step import forward_backward
from tests.support.ranks import SINGLE
from tests.unit.plan.test_replay import config_of

GPU = Environment(0, 1, 0, torch.device("cuda"))
"""As the watch sees it; the engine computes on the CPU."""


class Said:
    """Stands for the tracker."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.note, self.warn = self.notes.append, self.warnings.append


def changed(group: str, size: int) -> Callable[[Config, int], Estimate]:
    """A prediction that is off by `size` in one component, at every moment."""

    def wrong(config: Config, ranks: int) -> Estimate:
        right = predict(config, ranks)
        timeline = [
            Point(p.phase, p.where, {**p.components, group: p.components.get(group, 0) + size}) for p in right.timeline
        ]
        return replace(right, timeline=tuple(timeline))

    return wrong


def trained(watch: MemoryWatch, config: Config, updates: int = MEASURED_UPDATE, *, steps: int = 100) -> Said:
    engine: Engine = build_engine(build_model(config), config, SINGLE)
    rows = made_up_rows(config, 0, config.train.global_batch)
    said: Any = Said()
    for number in range(1, updates + 1):
        update = Update(number, number, 1e-3, last=number == steps)
        with watch.updating(engine, update):
            engine.begin_update(1e-3, 1.0)
            forward_backward(engine, rows, config.train.micro_batch, SINGLE)
            watch.backward_done(engine, update)
            engine.clip_gradients()
            engine.update()
        watch.updated(engine, update, said)
    return said


@pytest.mark.parametrize("optim", [{}, {"update": "per_layer", "state_bits": 32}], ids=str)
def test_a_right_prediction_is_noted_once(optim: dict[str, Any]) -> None:
    config = config_of(optim=optim, train={"global_batch": 4})
    watch = MemoryWatch(config, SINGLE, predict)
    said = trained(watch, config, MEASURED_UPDATE + 2)
    assert said.warnings == [] and len(said.notes) == 1 and "of live tensors" in said.notes[0]
    assert watch.observed is not None and watch.predicted is not None
    assert watch.values() == {
        "predicted_memory_bytes": watch.predicted.peak_bytes,
        "observed_memory_bytes": watch.observed.peak_bytes,
    }
    step = max(point.total for point in follow(config, SINGLE) if point.phase not in ("init", "save"))
    assert step <= watch.observed.peak_bytes  # what else this process has is counted too
    rows = dict(watch.summary())
    assert rows["predicted peak"].startswith(format_bytes(watch.predicted.peak_bytes))


@pytest.mark.parametrize(
    ("group", "blamed"),
    [("states", "optimizer states"), ("gradients", "gradients"), ("index", "index"), ("factors", "weights")],
)
def test_a_wrong_component_is_named(group: str, blamed: str) -> None:
    config = config_of()
    said = trained(MemoryWatch(config, SINGLE, changed(group, 200_000)), config)
    assert said.notes == [] and len(said.warnings) == 1
    assert f"{blamed} take" in said.warnings[0] or f"{blamed} of the supports take" in said.warnings[0]
    assert said.warnings[0].count("instead of") == 1


@pytest.mark.parametrize(
    ("share", "compiled", "warns"),
    [(1.0, False, False), (1.2, False, True), (0.8, False, True), (0.8, True, False), (1.2, True, False)],
)
def test_the_allocators_peak_is_compared(
    share: float, compiled: bool, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    watch = MemoryWatch(config_of(train={"compile": compiled}), GPU, predict)
    assert watch.predicted is not None and "on a GPU" not in dict(watch.summary())["predicted peak"]
    peak = int(share * watch.predicted.peak_bytes) + WORKSPACE_BYTES
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    said = trained(watch, config)
    assert watch.observed is not None and watch.observed.peak_bytes == peak
    assert bool(said.warnings) == warns and len(said.notes) == 1 - warns
    if warns:
        assert "activations, temporaries or buffers" in said.warnings[0]


@pytest.mark.slow
def test_compiled_blocks_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = config_of(train={"compile": True}, model={"num_layers": 1})
    watch = MemoryWatch(config, SINGLE, predict)
    said = trained(watch, config)
    assert said.warnings == [] and watch.observed is not None
    held = sum(watch.observed.component_bytes.values())
    assert held < watch.observed.peak_bytes


def test_a_short_run_is_measured_in_its_last_update() -> None:
    config = config_of()
    assert len(trained(MemoryWatch(config, SINGLE, predict), config, 1, steps=1).notes) == 1
    assert trained(MemoryWatch(config, SINGLE, predict), config, 2).notes == []


def test_a_failing_planner_stops_nothing() -> None:
    def broken(config: Config, ranks: int) -> Estimate:
        raise KeyError("rank")

    config = config_of()
    watch = MemoryWatch(config, SINGLE, broken)
    assert "KeyError" in watch.summary()[0][1]
    said = trained(watch, config)
    assert said.warnings == [] and len(said.notes) == 1
    assert list(watch.values()) == ["observed_memory_bytes"]


def test_the_largest_of_all_ranks_counts() -> None:
    class Others(Environment):
        def max(self, values: list[float]) -> list[float]:
            return list(np.asarray(values) + 1_000_000)

    config = config_of()
    watch = MemoryWatch(config, Others(0, 1, 0, torch.device("cpu")), predict)
    said = trained(watch, config)
    assert all(kind in said.warnings[0] for kind in ("weights take", "gradients take", "states take", "supports take"))
