"""What watches a run, beside what trains it. A new concern is a new class, and a place in train/build.py's list."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from sltrain_dist.parallel.engine import Engine
from sltrain_dist.tracking.tracker import RunTracker

MEASURED_UPDATE = 3
"""In the first two DDP arranges its buckets, ZeRO 3 traces the model, and optimizers make their states."""


@dataclass
class Update:
    """An update, while it is being made and after it.

    Attributes:
        number: Updates of this process, this one included.
        step: Updates of the run, this one included.
        lr: Learning rate.
        last: Whether it is the run's last, as far as `train.steps` says.
        loss: Mean loss; known after the backward pass.
        tokens: Non-padding tokens, over all ranks; known after the backward pass.
        grad_norm: Of all gradients before clipping; known after the update.
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
        """Whether what costs time to measure, and is the same in every update, is measured in this one."""
        return self.number == MEASURED_UPDATE or (self.last and self.number < MEASURED_UPDATE)


class Observer:
    """Watches a run. Every method does nothing unless a subclass says otherwise."""

    @contextmanager
    def updating(self, engine: Engine, update: Update) -> Iterator[None]:
        """Around all that an update does on the device."""
        yield

    def backward_done(self, engine: Engine, update: Update) -> None:
        """Between the backward pass and the optimizer's step: gradients are there, loss and tokens are known."""

    def updated(self, engine: Engine, update: Update, tracker: RunTracker) -> None:
        """After an update, of which everything is known.

        Raises:
            SltrainError: The run must not go on.
        """

    def values(self) -> Mapping[str, float]:
        """What every training line of metrics.jsonl says beside the training loop's own values."""
        return {}
