"""Stops a run that has diverged, before the bad update is made, or saved."""

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
    """Raises where the loss or the gradient norm of an update is not finite.

    Both are global numbers, the same on every rank, so that all ranks stop together.

    Raises:
        DivergedError: Naming the checkpoint to go back to.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    kept = list_checkpoints(checkpoints)
    back = f"the newest checkpoint is {kept[-1][1]}" if kept else "there is no checkpoint yet"
    if len(kept) > 1 and kept[-1][0] == step:
        back += f", which has these very weights, so that checkpoint.resume={kept[-2][1]} may be the one to go on from"
    made = optim.update == "per_layer" and not optim.passes_twice
    state = "was made in part, so that the model in memory is lost" if made else "was not made"
    raise DivergedError(
        f"update {step + 1} has loss {loss} and gradient norm {grad_norm}, and {state}; {back}. {_ADVICE}"
    )


def check_savable(engine: Engine, rows: Rows | None, config: Config, env: Environment, step: int) -> None:
    """Raises where the weights give no finite loss any more, so that no run could go on from them.

    The loss and the gradients of an update are those of the weights before it. This is one forward pass of one
    micro-batch with the weights after it, on every rank.

    Args:
        engine: The engine, after an update.
        rows: This rank's rows of the update.
        config: The run.
        env: This process among all.
        step: Updates made.

    Raises:
        DivergedError: On all ranks alike.
    """
    assert rows is not None, "there is nothing to save before the first update"
    there = torch.from_numpy(rows[: config.train.micro_batch]).to(env.device)
    loss = engine.evaluate(*to_batch(there, reset_attention=config.data.reset_attention))
    (total,) = env.sum([float(loss)])
    if not math.isfinite(total):
        raise DivergedError(f"after update {step} the loss is {total}, and no checkpoint of it was saved. {_ADVICE}")


def not_learning(loss: float, state: TrainState, config: Config) -> str | None:
    """What to tell of a run whose loss is no better than where it began, or than that of guessing; None of others."""
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
        f"({kept}; checkpoint.keep_every says how many). {_ADVICE}"
    )
