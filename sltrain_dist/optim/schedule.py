"""The learning rate as a pure function of the progress of training (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sltrain_dist.config.schema import OptimConfig


@dataclass(frozen=True)
class Progress:
    """The progress of a run at the beginning of an update.

    Attributes:
        step: Updates made so far.
        done: Share of the budget (updates or tokens) used so far, in [0, 1].
        warmup_done: Value of `done` when the warm-up ended; 0 during the warm-up.
    """

    step: int
    done: float
    warmup_done: float


def learning_rate(optim: OptimConfig, progress: Progress) -> float:
    """Returns the learning rate of the next update.

    Rises linearly over `warmup_steps` updates and reaches the peak at the last of them, then follows `schedule` over
    the rest of the budget, towards `min_lr_ratio` of the peak.
    """
    if progress.step < optim.warmup_steps:
        return optim.lr * (progress.step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    left = 1.0 - progress.warmup_done
    x = min(1.0, (progress.done - progress.warmup_done) / left) if left > 0 else 1.0
    shape = 0.5 * (1.0 + math.cos(math.pi * x)) if optim.schedule == "cosine" else 1.0 - x
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * shape)
