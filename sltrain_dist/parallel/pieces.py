"""What one rank holds: pieces of named parameters with their optimizer, whichever engine dealt them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.int8_weight import parts_of
from sltrain_dist.numerics.keyed import chunks
from sltrain_dist.optim.factory import (
    adopt_state,
    learning_rates,
    make_optimizer,
    saved_states,
    set_lr,
    state_tensors,
)
from sltrain_dist.optim.low_bit import AllReduceMax
from sltrain_dist.optim.state_layout import Place, shared_groups, stored_states


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
"""Reads (name, start, length) of a named flattened tensor from a checkpoint, onto the CPU. Initial values are read in
the same way."""


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a parameter: as many values as `parameter` has, from `start` of the flattened whole.

    Attributes:
        name: Engine-neutral name of the parameter.
        shape: Shape of the whole parameter.
        start: Where the piece begins in the flattened parameter.
        parameter: The piece, as a leaf that the optimizer steps; of any shape.
        saved: Whether this rank saves the piece; where several hold it, one of them does.
        borders: Where other ranks' pieces begin in the flattened parameter; needed of vectors.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    parameter: nn.Parameter
    saved: bool
    borders: tuple[int, ...] = ()

    @property
    def place(self) -> Place:
        """Where the piece lies."""
        return Place(self.name, self.shape, self.start, self.parameter.numel(), self.borders)


class Held:
    """Pieces of parameters, and an optimizer over them; with `optim.update: per_layer` one for each.

    Args:
        pieces: What this rank holds; empty pieces are left out.
        optim: Optimizer settings.
        agree: Makes the ranks agree on the scales of quantized blocks that they share.
    """

    def __init__(self, pieces: Sequence[Piece], optim: OptimConfig, agree: AllReduceMax | None = None) -> None:
        self.pieces = [piece for piece in pieces if piece.parameter.numel()]
        self._optim = optim
        # Agreeing takes all ranks, also one that holds nothing of a parameter whose blocks others share.
        stepped = [p for p in pieces if p.parameter.numel() or shared_groups(p.place, optim.state_bits)]
        named = [(piece.name, piece.parameter) for piece in stepped]
        places = {piece.name: piece.place for piece in stepped}
        # A rank may hold nothing: the whole of a model with more ranks than rows, or a remainder that is sharded.
        together = [named] if named and optim.update == "whole" else [[one] for one in named]
        self._optimizers = [make_optimizer(some, optim, places=places, all_reduce_max=agree) for some in together]
        self._optimizer_of = {
            name: optimizer for some, optimizer in zip(together, self._optimizers, strict=True) for name, _ in some
        }

    def gradients(self) -> list[Tensor]:
        """All gradients."""
        return [p.parameter.grad for p in self.pieces if p.parameter.grad is not None]

    def states(self) -> list[Tensor]:
        """All optimizer states but the counters of updates."""
        pairs = ((self._optimizer_of[piece.name], piece.parameter) for piece in self.pieces)
        return [state for optimizer, parameter in pairs for state in state_tensors(optimizer, parameter).values()]

    def learning_rates(self) -> list[float]:
        """Of all groups of the optimizer."""
        return [rate for optimizer in self._optimizers for rate in learning_rates(optimizer)]

    def update(self, lr: float) -> None:
        """Makes the optimizer's step and clears the gradients."""
        for optimizer in self._optimizers:
            _step(optimizer, lr)

    def step(self, piece: Piece, lr: float) -> None:
        """Updates one piece, with `optim.update: per_layer`, and clears its gradient; nothing where none is held."""
        if piece.name in self._optimizer_of:
            _step(self._optimizer_of[piece.name], lr)

    def chunks(self) -> Iterator[Chunk]:
        """The pieces that this rank saves, with their states."""
        for piece in self.pieces:
            if not piece.saved:
                continue
            for ending, part in parts_of(piece.parameter).items():
                shape = tuple(part.shape) if ending else piece.shape  # int8 weights are whole
                yield Chunk(f"model.{piece.name}{ending}", shape, piece.start, part.reshape(-1))
            optimizer = self._optimizer_of[piece.name]
            for stored, state in saved_states(optimizer, piece.parameter, piece.place, self._optim):
                if state.numel():
                    name = f"optim.{piece.name}.{stored.key}"
                    yield Chunk(name, stored.shape, stored.start + stored.skip, state)

    def load(self, read: ReadChunk, step: int) -> None:
        """Takes every piece and its states from a checkpoint made after `step` updates."""
        for piece in self.pieces:
            parameter = piece.parameter
            load_values(read, piece.name, parameter, piece.start)
            kept = stored_states(piece.place, self._optim, parameter.element_size()) if step else []
            states = {s.key: read(f"optim.{piece.name}.{s.key}", s.start, s.count) for s in kept}
            adopt_state(self._optimizer_of[piece.name], parameter, states, step)


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


def load_values(read: ReadChunk, name: str, parameter: Tensor, start: int = 0) -> None:
    """Overwrites a piece of a named parameter, from `start` of the flattened whole, with its values in a checkpoint."""
    for ending, part in parts_of(parameter).items():
        read_into(part, read, f"model.{name}{ending}", start)


def read_into(tensor: Tensor, read: ReadChunk, name: str, start: int) -> None:
    """Overwrites a detached, contiguous tensor with values of a named tensor from `start` on, chunk by chunk."""
    flat = tensor.view(-1)
    for first, stop in chunks(flat.numel()):
        flat[first:stop].copy_(read(name, start + first, stop - first))
