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

    Rises linearly over `warmup_steps` updates and reaches the peak at the last of them, then follows `schedule`. The
    decay towards `min_lr_ratio` of the peak ends with the budget. It begins after the warm-up, or with wsd where
    `decay_ratio` of the budget is left.
    """
    if progress.step < optim.warmup_steps:
        return optim.lr * (progress.step + 1) / optim.warmup_steps
    if not is_decaying(optim, progress):
        return optim.lr
    start = _decay_start(optim, progress)
    x = min(1.0, (progress.done - start) / (1.0 - start)) if start < 1 else 1.0
    shape = optim.decay_type if optim.schedule == "wsd" else optim.schedule
    left = {"cosine": 0.5 * (1.0 + math.cos(math.pi * x)), "linear": 1.0 - x, "1-sqrt": 1.0 - math.sqrt(x)}[shape]
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * left)


def is_decaying(optim: OptimConfig, progress: Progress) -> bool:
    """Returns whether the decay has begun, so that the learning rate of the next update is below the peak."""
    if optim.schedule == "constant" or progress.step < optim.warmup_steps:
        return False
    return progress.done > _decay_start(optim, progress)


def _decay_start(optim: OptimConfig, progress: Progress) -> float:
    """Returns the share of the budget after which the learning rate decays."""
    if optim.schedule == "wsd":
        return max(optim.stable_ratio, progress.warmup_done)
    return progress.warmup_done
