"""Measurement of what an update sends to other ranks, made once because every update sends the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from sltrain_dist.parallel.communication import Traffic
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.traffic import TrafficMeter
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.tracking.tracker import RunTracker
from sltrain_dist.train.observers.observer import MEASURED_UPDATE, Observer, Update
from sltrain_dist.train.summary import describe_traffic


class TrafficWatch(Observer):
    """An observer that measures the communication of one update, if there are several ranks."""

    def __init__(self, env: Environment) -> None:
        self._enabled = env.world_size > 1
        self._traffic: Traffic | None = None

    @contextmanager
    def updating(self, engine: Engine, update: Update) -> Iterator[None]:
        """Measures the communication of the update if it is the one to be measured."""
        if not self._enabled or update.number != MEASURED_UPDATE:
            yield
            return
        with TrafficMeter() as meter:
            yield
        self._traffic = meter.traffic

    def updated(self, engine: Engine, update: Update, tracker: RunTracker) -> None:
        """Reports the measurement once."""
        if self._traffic is not None and update.number == MEASURED_UPDATE:
            tracker.note(f"measured: {describe_traffic(self._traffic)}")

    def values(self) -> dict[str, float]:
        """Returns the bytes that this rank sends in an update, by kind of collective."""
        sent = {} if self._traffic is None else asdict(self._traffic)
        return {f"sent_{kind}_bytes": round(num_bytes) for kind, num_bytes in sent.items()}
