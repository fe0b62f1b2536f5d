"""Detection of runs that have diverged, before the bad update is made or saved."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from sltrain_dist.checkpoint.manifest import list_checkpoints
from sltrain_dist.config.schema import Config, OptimConfig
from sltrain_dist.errors import DivergedError
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.state import TrainState
from sltrain_dist.train.step import Rows, to_batch

_ROUNDING = 1e-3
_ADVICE = "Lower optim.lr, lengthen optim.warmup_steps, or set optim.clip"


def check_finite(loss: float, grad_norm: float, step: int, checkpoints: Path, optim: OptimConfig) -> None:
    """Checks that the loss and the gradient norm of an update are finite.

    Both are global values, the same on every rank, so that all ranks stop together.

    Raises:
        DivergedError: They are not. The message names the checkpoint to go back to.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    saved = list_checkpoints(checkpoints)
    back = f"the newest checkpoint is {saved[-1][1]}" if saved else "there is no checkpoint yet"
    if len(saved) > 1 and saved[-1][0] == step:
        back += f", which has these same weights; to resume from an earlier one, set checkpoint.resume={saved[-2][1]}"
    partial = optim.update == "per_layer" and not optim.passes_twice
    state = "was made in part, so that the model in memory is lost" if partial else "was not made"
    raise DivergedError(
        f"update {step + 1} has loss {loss} and gradient norm {grad_norm}, and {state}; {back}. {_ADVICE}"
    )


def check_savable(engine: Engine, rows: Rows | None, config: Config, env: Environment, step: int) -> None:
    """Checks that the weights still give a finite loss, so that a run can resume from them.

    The loss and gradients of an update belong to the weights before it. This check runs one forward pass of one
    micro-batch on every rank with the weights after it.

    Args:
        engine: The engine, after an update.
        rows: This rank's rows of the update.
        config: The configuration.
        env: The distributed environment.
        step: Number of updates made.

    Raises:
        DivergedError: The loss is not finite. Raised on all ranks.
    """
    assert rows is not None, "there is nothing to save before the first update"
    on_device = torch.from_numpy(rows[: config.train.micro_batch]).to(env.device)
    loss = engine.evaluate(*to_batch(on_device, reset_attention=config.data.reset_attention))
    (total,) = env.sum([float(loss)])
    if not math.isfinite(total):
        raise DivergedError(f"after update {step} the loss is {total}, and no checkpoint of it was saved. {_ADVICE}")


def not_learning(loss: float, state: TrainState, config: Config) -> str | None:
    """Returns a warning if the loss is no better than at the start, or than that of random guessing; else None."""
    guessing = math.log(config.model.vocab_size)
    began = guessing if state.first_loss is None else state.first_loss
    if state.step <= max(1, config.optim.warmup_steps) or loss < min(began, guessing) - _ROUNDING:
        return None
    kept = f"the newest {config.checkpoint.keep} checkpoints are kept"
    if config.checkpoint.keep_every:
        kept += f", and those of every {config.checkpoint.keep_every} updates"
    return (
        f"after {state.step} updates the loss is {loss:.3f}, no better than at the start ({began:.3f}) or than "
        f"guessing ({guessing:.3f}). If it stays there, the run has diverged: go back with checkpoint.resume=PATH "
        f"({kept}; set checkpoint.keep_every to keep more). {_ADVICE}"
    )
