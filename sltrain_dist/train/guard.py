"""Stops a run that has diverged, before the bad update is made, or saved."""

from __future__ import annotations

import math
from pathlib import Path

from sltrain_dist.checkpoint.manifest import list_checkpoints
from sltrain_dist.config.rules import passes_twice
from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.errors import DivergedError


def check_finite(loss: float, grad_norm: float, step: int, checkpoints: Path, optim: OptimConfig) -> None:
    """Raises where the loss or the gradient norm of an update is not finite.

    Both are global numbers, the same on every rank, so that all ranks stop together.

    Raises:
        DivergedError: Naming the checkpoint to go back to.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    kept = list_checkpoints(checkpoints)
    back = f"the newest checkpoint is {kept[-1][1]}" if kept else "there is no checkpoint yet"
    made = optim.update == "per_layer" and not passes_twice(optim)
    state = "was made in part, so that the model in memory is lost" if made else "was not made"
    raise DivergedError(
        f"update {step + 1} has loss {loss} and gradient norm {grad_norm}, and {state}; {back}. "
        "Lower optim.lr, lengthen optim.warmup_steps, or set optim.clip"
    )
