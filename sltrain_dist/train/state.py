"""The state of a run besides tensors, and the check of which settings may change when it is resumed."""

from __future__ import annotations

import ast
import base64
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from sltrain_dist.config.differences import changed_settings
from sltrain_dist.config.rules import idle_keys
from sltrain_dist.config.schema import Config, TrainConfig
from sltrain_dist.errors import CheckpointError, ConfigError
from sltrain_dist.files import first_problem
from sltrain_dist.optim.schedule import Progress, is_decaying

_FIXED_SECTIONS = ("model", "reparam")
_FIXED_KEYS = (
    "seed",
    "train.global_batch",
    "train.dtype",
    "optim.name",
    "optim.factors",
    "optim.state_bits",
    "optim.master_weights",
)
_FREE_KEYS = ("reparam.path", "reparam.row_block_bytes")
"""Keys of `data` are not listed: the loader's cursor contains a fingerprint of the data order and checks it."""
_OF_TRAINING = ("reparam.restart_every", "reparam.restart_warmup", "reparam.restart_states")
"""Keys that say how weights are trained, not what they are."""
_SCHEDULE_KEYS = (
    "train.steps",
    "train.tokens",
    "optim.schedule",
    "optim.min_lr_ratio",
    "optim.decay_ratio",
    "optim.decay_type",
)


@dataclass
class SpikeHistory:
    """What is usual in a run, and the spikes so far; see :mod:`sltrain_dist.train.divergence`.

    Attributes:
        losses: Losses of the last updates that were made, at most `train.spike_window`; empty with `train.spike: off`.
        norms: Their gradient norms before clipping.
        total: Number of spikes.
        in_row: Number of spikes since the furthest update.
        furthest: Number of the furthest update that was made, which rewinding does not change.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    total: int = 0
    in_row: int = 0
    furthest: int = 0


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: Number of updates made.
        tokens: Number of non-padding tokens trained on.
        warmup_tokens: Value of `tokens` at the end of the warm-up.
        elapsed_s: Seconds spent, including before the run was resumed.
        grad_norm: Gradient norm of the last update, which per-layer updates clip by; None before the first.
        first_loss: Loss of the first update; None before it.
        spikes: What is usual, and the spikes so far.
    """

    step: int = 0
    tokens: int = 0
    warmup_tokens: int = 0
    elapsed_s: float = 0.0
    grad_norm: float | None = None
    first_loss: float | None = None
    spikes: SpikeHistory = field(default_factory=SpikeHistory)

    def advance(self, tokens: int, warmup_steps: int) -> None:
        """Counts one update."""
        self.step += 1
        self.tokens += tokens
        if self.step <= warmup_steps:
            self.warmup_tokens = self.tokens

    def finished(self, train: TrainConfig) -> bool:
        """Whether the budget is used up."""
        if train.steps is not None:
            return self.step >= train.steps
        return self.tokens >= (train.tokens or 0)

    def progress(self, train: TrainConfig, warmup_steps: int) -> Progress:
        """Returns the progress of the run, for the learning-rate schedule."""
        if train.steps is not None:
            # The last update reaches the end of the schedule.
            last = max(1, train.steps - 1)
            return Progress(self.step, self.step / last, min(1.0, max(0, warmup_steps - 1) / last))
        budget = train.tokens or 1
        warm = self.warmup_tokens if self.step >= warmup_steps else 0
        return Progress(self.step, self.tokens / budget, warm / budget)

    def to_dict(self) -> dict[str, Any]:
        """Returns the counters as a dictionary that JSON can represent."""
        return asdict(self)


class Saved(BaseModel):
    """The state of a run in a checkpoint, besides tensors."""

    counters: TrainState
    data: dict[str, Any]
    """The loader's cursor, whose content the loader checks."""
    rng: list[dict[str, str]]
    """Random-number states by rank; see :func:`rng_state`."""
    supports: str
    """Fingerprint of all supports."""


def read_saved(state: Mapping[str, Any], step: int, where: str) -> Saved:
    """Parses and checks the state of a run in a checkpoint.

    Args:
        state: See :meth:`sltrain_dist.checkpoint.store.CheckpointStore.save`.
        step: Number of updates according to the manifest.
        where: Name of the checkpoint in messages.

    Raises:
        CheckpointError: The state has another form, or is of another step.
    """
    try:
        saved = Saved.model_validate(state)
    except ValidationError as error:
        raise CheckpointError(f"{where} is damaged: state.json: {first_problem(error)}") from None
    if saved.counters.step != step:
        raise CheckpointError(f"{where} is damaged: state.json is of step {saved.counters.step} instead of {step}")
    return saved


def rng_state(device: torch.device) -> dict[str, str]:
    """Returns the states of this process's random-number generators, as text."""
    state = {"torch": _encode(torch.get_rng_state()), "python": repr(random.getstate())}
    if device.type == "cuda":
        state["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return state


def restore_rng(state: Mapping[str, str], device: torch.device) -> None:
    """Restores the states of the random-number generators; those of another kind of device are ignored.

    Raises:
        CheckpointError: The states are invalid.
    """
    try:
        torch.set_rng_state(_decode(state["torch"]))
        random.setstate(ast.literal_eval(state["python"]))
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(_decode(state["cuda"]), device)
    except (KeyError, TypeError, ValueError, SyntaxError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's random-number states cannot be read: {error!r}") from None


def check_resumable(before: Config, now: Config, where: str) -> list[str]:
    """Checks that a checkpoint can be resumed with the current configuration.

    Returns:
        A line for every allowed difference between the configurations.

    Raises:
        CheckpointError: A setting differs that must not change during a run.
    """
    notes: list[str] = []
    fatal: list[str] = []
    for key, old, new in changed_settings(before, now):
        section = key.partition(".")[0]
        fixed = (section in _FIXED_SECTIONS or key in _FIXED_KEYS) and key not in _FREE_KEYS
        if key == "optim.state_bits" and {old, new} == {16, 32}:
            fixed = False  # plain floats are converted
        (fatal if fixed else notes).append(f"{key}: {old!r} → {new!r}")
    if fatal:
        raise CheckpointError(
            f"{where} belongs to a run with another configuration ({'; '.join(fatal)}); "
            "set these back, or use another run_dir"
        )
    return notes


def check_schedule(before: Config, now: Config, counters: TrainState, where: str) -> None:
    """Checks that a change of the schedule `wsd` does not contradict the updates made before a checkpoint.

    Until its decay begins, wsd has the same learning rates whatever its length and its decay. So neither the old nor
    the new schedule, as far as they are wsd, may have begun to decay at the checkpoint. The resumed run then equals one
    that had the new schedule from its beginning.

    Raises:
        CheckpointError: The schedule has changed, and the decay of one of the two has begun.
    """
    changes = [f"{key}: {old!r} → {new!r}" for key, old, new in changed_settings(before, now) if key in _SCHEDULE_KEYS]
    for config, whose in ((before, "that run's"), (now, "this configuration's")):
        progress = counters.progress(config.train, config.optim.warmup_steps)
        if changes and config.optim.schedule == "wsd" and is_decaying(config.optim, progress):
            longer = f", or set {_length_to_decay_later(counters, now)}" if config is now else ""
            raise CheckpointError(
                f"{where} is of update {counters.step}, where {whose} decay has begun, so optim.schedule=wsd cannot "
                f"change ({'; '.join(changes)}); set these back, or resume from a checkpoint before the decay with "
                f"checkpoint.resume=PATH{longer}"
            )


def _length_to_decay_later(counters: TrainState, config: Config) -> str:
    """Returns the shortest length of a run with which wsd has not begun to decay yet, as the setting to change."""
    stable = config.optim.stable_ratio
    if stable == 0:
        return "a lower optim.decay_ratio"
    if config.train.steps is None:
        return f"train.tokens={math.ceil(counters.tokens / stable)} or more"
    return f"train.steps={math.ceil(counters.step / stable) + 1} or more"


def check_weights_fit(before: Config, now: Config, where: str) -> list[str]:
    """Checks that a new run can start from the weights of a checkpoint (`checkpoint.init_from`).

    The shape of the model must be the same, and with the same method also its settings. Between methods, linear layers
    are converted.

    Returns:
        A line for every difference that changes what the model computes.

    Raises:
        ConfigError: The weights do not fit.
    """
    notes: list[str] = []
    fatal: list[str] = []
    same_method = before.reparam.method == now.reparam.method
    if not same_method and "cola" in (before.reparam.method, now.reparam.method):
        raise ConfigError(
            f"checkpoint.init_from = {where}: it has reparam.method={before.reparam.method}, and a layer of cola has "
            "no weight that could be converted; set reparam.method as in the checkpoint"
        )
    fixed = {"model", "reparam" if same_method else "reparam.weight_bits"}
    for key, old, new in changed_settings(before, now.with_supports_of(before)):
        difference = f"{key}: {old!r} in the checkpoint, {new!r} here"
        if key in ("reparam.method", "model.rope_theta", "model.norm_eps"):
            notes.append(difference)
        elif {key, key.partition(".")[0]} & fixed and key not in (
            *_FREE_KEYS,
            *_OF_TRAINING,
            "model.init_std",
            *idle_keys(now),
        ):
            fatal.append(difference)
    if fatal:
        raise ConfigError(
            f"checkpoint.init_from = {where}: its weights do not fit this run ({'; '.join(fatal)}); set these as in "
            "the checkpoint, or start without checkpoint.init_from"
        )
    return notes


def _encode(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
