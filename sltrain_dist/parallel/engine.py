"""What the training loop asks of a distributed engine, and what engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.optim.factory import STATE_NAMES, adopt_state, make_optimizer, set_lr


@dataclass(frozen=True)
class Chunk:
    """A contiguous piece of a named tensor, flattened: the unit that checkpoints are made of.

    Attributes:
        name: Engine-neutral name: "model.<parameter>" or "optim.<parameter>.<state>".
        shape: Shape of the whole tensor.
        start: Where the piece begins in the flattened tensor.
        data: The piece, one-dimensional.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor


ReadChunk = Callable[[str, int, int], Tensor]
"""Reads (name, start, length) of a named flattened tensor from a checkpoint, onto the CPU."""


class Engine(Protocol):
    """A model whose gradients and optimizer may be spread over ranks.

    Gradients are *sums* over micro-batches and ranks of `weight` times the summed loss: the training step
    divides by the number of labels of the global batch, so that no engine averages anything.
    """

    @property
    def module(self) -> nn.Module:
        """The model itself, with its engine-neutral parameter names."""
        ...

    def micro_step(self, input_ids: Tensor, labels: Tensor, weight: float, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; gradients are complete after the `last` one.

        Returns:
            The summed loss of this rank's micro-batch, detached, before weighting.
        """
        ...

    def clip_gradients(self, max_norm: float) -> float:
        """The global gradient norm; gradients are scaled down to `max_norm` where that is exceeded (0: never).

        Every parameter counts once, and every rank gets the same number.
        """
        ...

    def update(self, lr: float) -> None:
        """Makes the optimizer's step with learning rate `lr` and clears the gradients."""
        ...

    def evaluate(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The summed loss of a batch, without gradients. All ranks must call it equally often."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """The pieces of parameters and optimizer states that this rank saves; all ranks' together are whole."""
        ...

    def load(self, read: ReadChunk, step: int) -> None:
        """Takes parameters and optimizer states from a checkpoint made after `step` updates."""
        ...


def squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares over tensors, in float32, as a scalar tensor."""
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients are multiplied with: 1, or what brings their norm down to `max_norm` (0: never)."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


class Replicated:
    """Parameters that are whole on every rank, with their optimizer: all of them under ddp, the remainder
    under `parallel.shard: factors`.

    Args:
        parameters: Named parameters.
        optim: Optimizer settings.
        rank: This rank; it saves every world_size-th parameter.
        world_size: Number of ranks.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter]], optim: OptimConfig, rank: int, world_size: int
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = make_optimizer(self.parameters, optim)
        self.state_names = STATE_NAMES[optim.name]
        self.rank, self.world_size = rank, world_size

    def gradients(self) -> list[Tensor]:
        """All gradients."""
        return [p.grad for _, p in self.parameters if p.grad is not None]

    def all_reduce(self) -> None:
        """Sums the gradients over all ranks, in one flat message per type."""
        if self.world_size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in self.gradients():
            by_type.setdefault(gradient.dtype, []).append(gradient)
        for gradients in by_type.values():
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))

    def update(self, lr: float) -> None:
        """Makes the optimizer's step and clears the gradients."""
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def chunks(self) -> Iterator[Chunk]:
        """This rank's share of the parameters, whole, with their states."""
        for index, (name, parameter) in enumerate(self.parameters):
            if index % self.world_size != self.rank:
                continue
            yield whole_chunk(f"model.{name}", parameter)
            for key, state in self.optimizer.state.get(parameter, {}).items():
                if key in self.state_names:
                    yield whole_chunk(f"optim.{name}.{key}", state)

    def load(self, read: ReadChunk, step: int) -> None:
        """Takes every parameter and its states from a checkpoint."""
        for name, parameter in self.parameters:
            load_parameter(read, name, parameter)
            states = {
                key: read(f"optim.{name}.{key}", 0, parameter.numel()).view_as(parameter).to(parameter)
                for key in (self.state_names if step else ())
            }
            adopt_state(self.optimizer, parameter, states, step)


def whole_chunk(name: str, tensor: Tensor) -> Chunk:
    """A chunk that is the whole tensor."""
    return Chunk(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def load_parameter(read: ReadChunk, name: str, parameter: Tensor) -> None:
    """Overwrites a whole parameter with its values in a checkpoint."""
    with torch.no_grad():
        parameter.copy_(read(f"model.{name}", 0, parameter.numel()).view_as(parameter))
