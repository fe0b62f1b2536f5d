"""What the training loop asks of a distributed engine, and the gradient norm that all engines share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain_dist.optim.clipping import coefficient
from sltrain_dist.parallel.pieces import Chunk, ReadChunk
from sltrain_dist.runtime.environment import Environment

Kind = Literal["parameters", "gradients", "states"]
"""What an engine's tensors are. parameters: with masters and shards. states: the optimizer's."""


class Engine(Protocol):
    """A model whose parameters, gradients and optimizer may be spread over ranks.

    Gradients are *sums* over micro-batches and ranks of `weight` times the summed loss: the training step
    divides by the number of labels of the global batch, so that no engine averages anything.

    An update is `begin_update`, every `micro_step`, `clip_gradients` and `update`, in this order. With
    `optim.update: per_layer` the parameters are updated within the last `micro_step`.
    """

    @property
    def module(self) -> nn.Module:
        """The model itself; its parameters may be shards, or away, between calls."""
        ...

    def begin_update(self, lr: float, previous_norm: float | None) -> None:
        """Says how the update that now begins is made.

        Args:
            lr: Learning rate.
            previous_norm: What `clip_gradients` returned in the update before; None in the very first.
        """
        ...

    def micro_step(
        self, input_ids: Tensor, labels: Tensor, weight: float, *, last: bool, positions: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; gradients are complete after the `last` one.

        `positions` are the model's, where several documents share a row.

        Returns:
            The summed loss of this rank's micro-batch, detached, before weighting.
        """
        ...

    def clip_gradients(self) -> float:
        """The global gradient norm; gradients are scaled down to `optim.clip` where that is exceeded (0: never).

        Every parameter counts once, and every rank gets the same number, also where it is not finite.
        """
        ...

    def update(self) -> None:
        """Makes the optimizer's step, where that has not been made, and clears the gradients."""
        ...

    def evaluate(self, input_ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """The summed loss of a batch, without gradients. All ranks must call it equally often."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """The pieces of parameters and optimizer states that this rank saves; all ranks' together are whole."""
        ...

    def load(self, read: ReadChunk, step: int) -> None:
        """Takes parameters and optimizer states from a checkpoint made after `step` updates."""
        ...

    def tensors(self) -> dict[Kind, list[Tensor]]:
        """The tensors that are alive on this rank by kind; several may share memory. For accounting and checks."""
        ...

    def learning_rates(self) -> list[float]:
        """What the optimizers' groups were stepped with last."""
        ...

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """What ought to be the same on every rank, by parameter name, in one order on all."""
        ...


def backward_of(model: nn.Module, input_ids: Tensor, labels: Tensor, positions: Tensor | None, weight: float) -> Tensor:
    """Forward and backward of `weight` times the summed loss; returns the latter, detached."""
    loss = model(input_ids, labels, positions)
    (loss * weight).backward()
    return loss.detach()


def squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares over tensors, in float32, as a scalar tensor on `device`."""
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum().to(device)


def clip_shards(
    shards: list[Tensor], whole: list[Tensor], max_norm: float, env: Environment, *, copies: int = 1
) -> float:
    """Scales gradients down to a global norm, and returns what that was before.

    One all-reduce carries every rank's part, so that all of them see the same number: a value that is not
    finite on one rank is not finite on any.

    Args:
        shards: This rank's gradients of sharded parameters.
        whole: Gradients that every rank holds whole, and equal; they count once.
        max_norm: Largest norm; 0 for no limit.
        env: This process among all.
        copies: Ranks that hold the same shards.
    """
    total = squared_norm(shards, env.device)
    if env.world_size > 1:
        dist.all_reduce(total)
    norm = float((total / copies + squared_norm(whole, env.device)).sqrt())
    scale_down([*shards, *whole], norm, max_norm)
    return norm


def scale_down(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Multiplies gradients with what brings `norm` down to `max_norm`, if it is larger (0: never)."""
    scale = coefficient(norm, max_norm)
    if scale < 1 and gradients:
        torch._foreach_mul_(gradients, scale)
