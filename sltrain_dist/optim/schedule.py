"""The learning rate as a pure function of how far the run is (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sltrain_dist.config.schema import OptimConfig


@dataclass(frozen=True)
class Progress:
    """How far a run is when an update begins.

    Attributes:
        step: Updates made so far.
        done: Share of the budget (updates, or tokens) used so far, in [0, 1].
        warmup_done: `done` as it was when the warm-up ended; 0 while it lasts.
    """

    step: int
    done: float
    warmup_done: float


def learning_rate(optim: OptimConfig, progress: Progress) -> float:
    """Learning rate of the next update.

    Rises linearly over `warmup_steps` updates, reaching the peak at the last of them, then follows
    `schedule` over what is left of the budget, towards `min_lr_ratio` of the peak.
    """
    if progress.step < optim.warmup_steps:
        return optim.lr * (progress.step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    left = 1.0 - progress.warmup_done
    x = min(1.0, (progress.done - progress.warmup_done) / left) if left > 0 else 1.0
    shape = 0.5 * (1.0 + math.cos(math.pi * x)) if optim.schedule == "cosine" else 1.0 - x
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * shape)
