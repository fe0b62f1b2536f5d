"""The interface of observers of a run. To add one, write a subclass and add it to the list in train/build.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from sltrain_dist.parallel.engine import Engine
from sltrain_dist.tracking.tracker import RunTracker

MEASURED_UPDATE = 3
"""In earlier updates DDP arranges its buckets, ZeRO 3 traces the model, and optimizers create their states."""


@dataclass
class Update:
    """An update that is in progress or done.

    Attributes:
        number: Number of the update in this process, from 1.
        step: Number of the update in the run, from 1.
        lr: Learning rate.
        last: Whether it is the last update according to `train.steps`.
        loss: Mean loss; known after the backward pass.
        tokens: Number of non-padding tokens over all ranks; known after the backward pass.
        grad_norm: Global gradient norm before clipping; known after the update.
    """

    number: int
    step: int
    lr: float
    last: bool
    loss: float = math.nan
    tokens: int = 0
    grad_norm: float = math.nan

    @property
    def is_measured(self) -> bool:
        """Whether to make the expensive measurements, whose results are the same in every update, in this one."""
        return self.number == MEASURED_UPDATE or (self.last and self.number < MEASURED_UPDATE)


class Observer:
    """Base class of observers, whose methods do nothing unless a subclass overrides them."""

    @contextmanager
    def updating(self, engine: Engine, update: Update) -> Iterator[None]:
        """Encloses all work of an update on the device."""
        yield

    def backward_done(self, engine: Engine, update: Update) -> None:
        """Called between the backward pass and clipping, when gradients, loss and tokens are known."""

    def updated(self, engine: Engine, update: Update, tracker: RunTracker) -> None:
        """Called after an update, when all its values are known.

        Raises:
            SltrainError: The run must stop.
        """

    def values(self) -> Mapping[str, float]:
        """Returns additional values for the training lines of metrics.jsonl."""
        return {}
