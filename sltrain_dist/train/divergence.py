"""Detection of runs that diverge, before the bad update is made or saved: values that are not finite, and spikes.

A spike is an update whose loss or gradient norm is far above what it was (`train.spike`). Loss and gradient norm are
the same numbers on every rank, and so is every decision made here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from sltrain_dist.checkpoint.manifest import list_checkpoints
from sltrain_dist.config.schema import Config, OptimConfig, TrainConfig
from sltrain_dist.errors import DivergedError
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.state import SpikeHistory, TrainState
from sltrain_dist.train.step import Rows, to_batch

_ROUNDING = 1e-3
_ADVICE = "Lower optim.lr, lengthen optim.warmup_steps, or set optim.clip"
_MAD_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
_LEAST_SPREAD = 0.01
"""Least spread, as a share of the median: losses that hardly scatter must not make a spike of a harmless change."""


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


def find_spike(history: SpikeHistory, loss: float, grad_norm: float, train: TrainConfig) -> str | None:
    """Returns what is wrong with an update that is a spike, for a message; None if it is none.

    Args:
        history: The losses and norms of earlier updates.
        loss: Loss of the update.
        grad_norm: Its gradient norm before clipping.
        train: Settings; with `spike: off` there are no spikes.
    """
    if train.spike == "off":
        return None
    for name, value, before in (("loss", loss, history.losses), ("gradient norm", grad_norm, history.norms)):
        if not math.isfinite(value):
            return f"its {name} is {value}"
        if len(before) < train.spike_window:
            continue
        median, spread = _median_and_spread(before)
        if value > median + train.spike_threshold * spread:
            return f"its {name} is {value:.4g}, where the last {len(before)} had {median:.4g} ± {spread:.2g}"
    return None


def remember(history: SpikeHistory, loss: float, grad_norm: float, step: int, train: TrainConfig) -> None:
    """Adds an update that was made to the history; the run has made progress if it is the furthest so far."""
    if train.spike == "off":
        return
    history.losses = [*history.losses, loss][-train.spike_window :]
    history.norms = [*history.norms, grad_norm][-train.spike_window :]
    if step > history.furthest:
        history.furthest, history.in_row = step, 0


def count_spike(history: SpikeHistory, what: str, step: int, train: TrainConfig) -> None:
    """Counts a spike.

    Raises:
        DivergedError: There have been too many without progress.
    """
    history.total += 1
    history.in_row += 1
    if history.in_row > train.spike_limit:
        raise DivergedError(
            f"update {step} is a spike: {what}; it is number {history.in_row} in a row without progress, above "
            f"train.spike_limit = {train.spike_limit}. Lower optim.lr or set optim.clip, and go back with "
            "checkpoint.resume=PATH"
        )


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns the median, and a standard deviation that outliers do not change, at least a hundredth of the median."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return median, max(_MAD_TO_DEVIATION * deviation, _LEAST_SPREAD * abs(median))
