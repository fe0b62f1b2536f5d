"""What one rank holds: pieces of named parameters with their optimizer, whichever engine dealt them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.optim.factory import adopt_state, learning_rates, make_optimizer, set_lr
from sltrain_dist.optim.state_layout import STATE_NAMES


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


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a parameter: as many values as `parameter` has, from `start` of the flattened whole.

    Attributes:
        name: Engine-neutral name of the parameter.
        shape: Shape of the whole parameter.
        start: Where the piece begins in the flattened parameter.
        parameter: The piece, as a leaf that the optimizer steps; of any shape.
        saved: Whether this rank saves the piece; where several hold it, one of them does.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    parameter: nn.Parameter
    saved: bool


class Held:
    """Pieces of parameters, and an optimizer over them; with `optim.update: per_layer` one for each.

    Args:
        pieces: What this rank holds; empty pieces are left out.
        optim: Optimizer settings.
    """

    def __init__(self, pieces: Sequence[Piece], optim: OptimConfig) -> None:
        self.pieces = [piece for piece in pieces if piece.parameter.numel()]
        named = [(piece.name, piece.parameter) for piece in self.pieces]
        # A rank may hold nothing: the whole of a model with more ranks than rows, or a remainder that is sharded.
        together = [named] if named and optim.update == "whole" else [[one] for one in named]
        self._optimizers = [make_optimizer(some, optim) for some in together]
        self._optimizer_of = {
            name: optimizer for some, optimizer in zip(together, self._optimizers, strict=True) for name, _ in some
        }
        self._state_names = STATE_NAMES[optim.name]

    def gradients(self) -> list[Tensor]:
        """All gradients."""
        return [p.parameter.grad for p in self.pieces if p.parameter.grad is not None]

    def states(self) -> list[Tensor]:
        """All optimizer states but the counters of updates."""
        states = (self._state(piece) for piece in self.pieces)
        return [state[key] for state in states for key in self._state_names if key in state]

    def learning_rates(self) -> list[float]:
        """Of all groups of the optimizer."""
        return [rate for optimizer in self._optimizers for rate in learning_rates(optimizer)]

    def update(self, lr: float) -> None:
        """Makes the optimizer's step and clears the gradients."""
        for optimizer in self._optimizers:
            _step(optimizer, lr)

    def step(self, piece: Piece, lr: float) -> None:
        """Updates one piece, with `optim.update: per_layer`, and clears its gradient."""
        _step(self._optimizer_of[piece.name], lr)

    def chunks(self) -> Iterator[Chunk]:
        """The pieces that this rank saves, with their states."""
        for piece in self.pieces:
            if not piece.saved:
                continue
            yield Chunk(f"model.{piece.name}", piece.shape, piece.start, piece.parameter.detach().reshape(-1))
            for key, state in self._state(piece).items():
                if key in self._state_names:
                    yield Chunk(f"optim.{piece.name}.{key}", piece.shape, piece.start, state.detach().reshape(-1))

    def load(self, read: ReadChunk, step: int) -> None:
        """Takes every piece and its states from a checkpoint made after `step` updates."""
        for piece in self.pieces:
            parameter, where = piece.parameter, (piece.start, piece.parameter.numel())
            with torch.no_grad():
                parameter.copy_(read(f"model.{piece.name}", *where).view_as(parameter))
            states = {
                key: read(f"optim.{piece.name}.{key}", *where).view_as(parameter).to(parameter)
                for key in (self._state_names if step else ())
            }
            adopt_state(self._optimizer_of[piece.name], parameter, states, step)

    def _state(self, piece: Piece) -> dict[str, Tensor]:
        return self._optimizer_of[piece.name].state.get(piece.parameter, {})


class Replicated(Held):
    """Parameters that are whole on every rank: all of them under ddp, the dense remainder under
    `parallel.shard: factors`.

    Args:
        parameters: Named parameters.
        optim: Optimizer settings.
        rank: This rank; it saves every world_size-th parameter.
        world_size: Number of ranks.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter]], optim: OptimConfig, rank: int, world_size: int
    ) -> None:
        self.world_size = world_size
        pieces = (
            Piece(name, tuple(parameter.shape), 0, parameter, index % world_size == rank)
            for index, (name, parameter) in enumerate(parameters)
        )
        super().__init__(list(pieces), optim)

    def all_reduce(self, scale: float = 1.0) -> None:
        """Sums the gradients over all ranks, in one flat message per type, and multiplies them with `scale`."""
        if self.world_size == 1 and scale == 1.0:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in self.gradients():
            by_type.setdefault(gradient.dtype, []).append(gradient)
        for gradients in by_type.values():
            flat = torch.cat([g.reshape(-1) for g in gradients])
            if self.world_size > 1:
                dist.all_reduce(flat)
            if scale != 1.0:
                flat.mul_(scale)
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))


def _step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def load_whole(read: ReadChunk, name: str, parameter: Tensor) -> None:
    """Overwrites a whole parameter with its values in a checkpoint."""
    with torch.no_grad():
        parameter.copy_(read(f"model.{name}", 0, parameter.numel()).view_as(parameter))
