"""The protocol between the training loop and the distributed engines, and gradient clipping for all engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain_dist.optim.clipping import coefficient
from sltrain_dist.parallel.pieces import ClearedAt, ReadRange, SavedRange, never_cleared
from sltrain_dist.runtime.environment import Environment

Kind = Literal["parameters", "gradients", "states"]
"""Kind of an engine's tensors. parameters: including shards and master weights. states: optimizer states."""


class Engine(Protocol):
    """A model whose parameters, gradients and optimizer states may be sharded over ranks.

    Gradients are *sums* over micro-batches and ranks of `weight` times the summed loss: the training step sets
    `weight` to one over the number of labels of the global batch, so that engines never average.

    An update consists of `begin_update`, one `micro_step` per micro-batch, `clip_gradients` and `update` or
    `discard`, in this order. With `optim.update: per_layer` the parameters are updated during the last `micro_step`.
    """

    @property
    def module(self) -> nn.Module:
        """The model; between calls its parameters may be shards or empty."""
        ...

    def begin_update(self, lr: float, previous_norm: float | None) -> None:
        """Begins an update.

        Args:
            lr: Learning rate.
            previous_norm: Gradient norm that `clip_gradients` returned in the previous update; None in the first.
        """
        ...

    def micro_step(
        self, input_ids: Tensor, labels: Tensor, weight: float, *, last: bool, positions: Tensor | None = None
    ) -> Tensor:
        """Runs forward and backward of one micro-batch; gradients are complete after the `last` one.

        `positions` are those of the tokens in their documents, if several documents share a row.

        Returns:
            The summed loss of this rank's micro-batch, detached, before weighting.
        """
        ...

    def clip_gradients(self) -> float:
        """Scales the gradients down to the norm `optim.clip` if it is exceeded (0: never); returns the norm before.

        Every parameter counts once, and all ranks return the same number, even if it is not finite.
        """
        ...

    def update(self) -> None:
        """Runs the optimizer step, unless per-layer updates have done so, and frees the gradients."""
        ...

    def discard(self) -> None:
        """Frees the gradients without an update, in place of `update`; it counts for Adam's bias correction.

        Per-layer updates have been made by then, and stay.
        """
        ...

    def evaluate(self, input_ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns the summed loss of a batch, without gradients. All ranks must call it equally often."""
        ...

    def next_logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Returns the logits of one token in each row, without gradients. All ranks must call it equally often.

        Args:
            input_ids: (batch, length), int64. What follows a row's token `last` has no effect.
            last: (batch,), int64.

        Returns:
            (batch, vocabulary).
        """
        ...

    def saved_ranges(self) -> Iterator[SavedRange]:
        """Yields the parts of parameters and optimizer states that this rank saves; all ranks together save all."""
        ...

    def load(self, read: ReadRange, step: int, cleared_at: ClearedAt = never_cleared) -> None:
        """Loads parameters and optimizer states from a checkpoint made after `step` updates.

        `cleared_at` returns the update after which a parameter's states were last cleared (:meth:`clear_states`), from
        which Adam's bias correction counts.
        """
        ...

    def free_gathered(self) -> None:
        """Frees weights that are still gathered from their shards, such as after an evaluation.

        Must be called before :meth:`set_values`, because gathered weights would keep the old values.
        """
        ...

    def held_ranges(self, name: str) -> Iterator[SavedRange]:
        """Yields the ranges of a named parameter that this rank saves, and their exact values, flat.

        The ranks together yield every value once. With fp32 master weights these are the values.
        """
        ...

    def set_values(self, name: str, values: Tensor) -> None:
        """Sets everything that this rank holds of a named parameter, between updates.

        Args:
            name: Name of the parameter.
            values: All values of the whole parameter, flat, in float32, the same on all ranks. They are rounded to the
                nearest value of the parameter's type; int8 weights get a new scale for every row.
        """
        ...

    def clear_states(self, chosen: Callable[[str], bool]) -> None:
        """Sets the optimizer states of all parameters whose names are chosen to what they are before the first update.

        Master weights are kept.
        """
        ...

    def tensors(self) -> dict[Kind, list[Tensor]]:
        """Returns the live tensors of this rank by kind, for accounting and checks; several may share memory."""
        ...

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of the last step, of all parameter groups of all optimizers."""
        ...

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of everything that must be identical on all ranks, in the same order on all."""
        ...


def backward_of(model: nn.Module, input_ids: Tensor, labels: Tensor, positions: Tensor | None, weight: float) -> Tensor:
    """Runs forward and backward of `weight` times the summed loss; returns the summed loss, detached."""
    loss = model(input_ids, labels, positions)
    (loss * weight).backward()
    return loss.detach()


def squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of squares over tensors, in float32, as a scalar tensor on `device`."""
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum().to(device)


def clip_shards(
    shards: list[Tensor], whole: list[Tensor], max_norm: float, env: Environment, *, copies: int = 1
) -> float:
    """Clips gradients to a global norm, and returns the norm before clipping.

    One all-reduce sums the squares of all ranks, so that all of them compute the same norm: if a value is not finite
    on one rank, the norm is not finite on any.

    Args:
        shards: This rank's gradients of sharded parameters.
        whole: Gradients of replicated parameters, identical on every rank; they count once.
        max_norm: Maximum norm; 0 for no limit.
        env: The distributed environment.
        copies: Number of ranks with the same shards.
    """
    total = squared_norm(shards, env.device)
    if env.world_size > 1:
        dist.all_reduce(total)
    norm = float((total / copies + squared_norm(whole, env.device)).sqrt())
    scale_down([*shards, *whole], norm, max_norm)
    return norm


def scale_down(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Scales gradients of norm `norm` down to `max_norm`, if it is exceeded (0: never)."""
    scale = coefficient(norm, max_norm)
    if scale < 1 and gradients:
        torch._foreach_mul_(gradients, scale)
