"""The pieces of named parameters on one rank, with their optimizers, independent of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.int8_weight import parts_of, plain
from sltrain_dist.numerics.keyed import chunks
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.factory import (
    adopt_state,
    by_optimizer,
    clear_states,
    count_step,
    learning_rates,
    make_optimizer,
    master_weights,
    saved_states,
    set_lr,
    state_tensors,
)
from sltrain_dist.optim.low_bit import AllReduceMax
from sltrain_dist.optim.matrix.jobs import WholeMatrices
from sltrain_dist.optim.projected.adam import Job, Share, compute_all
from sltrain_dist.optim.state_layout import is_orthogonalized, shared_groups, stored_states

SavedRange = tuple[TensorRange, Tensor]
"""A range of a tensor under its engine-neutral name, "model.<parameter>" or "optim.<parameter>.<state>", and its
values (count,): the unit that checkpoints store."""

ReadRange = Callable[[str, int, int], Tensor]
"""Reads the range (name, start, count) of a flattened named tensor from a checkpoint to the CPU. Initial values are
read by the same interface."""

ClearedAt = Callable[[str], int]
"""Returns the number of the update after which a named parameter's optimizer states were last cleared; 0: never."""


def never_cleared(name: str) -> int:
    """Returns 0: no states were ever cleared."""
    return 0


@dataclass(frozen=True)
class Piece:
    """The range of a parameter that is on this rank.

    Attributes:
        range: The range, under the parameter's engine-neutral name.
        parameter: Its values, as a leaf that the optimizer updates; of any shape.
        saved: Whether this rank saves the piece; exactly one of the ranks that have it does.
    """

    range: TensorRange
    parameter: nn.Parameter
    saved: bool

    @property
    def name(self) -> str:
        """Engine-neutral name of the parameter."""
        return self.range.name


class LocalPieces:
    """The pieces of parameters on this rank and their optimizer; with `optim.update: per_layer` one per piece.

    Matrices that `optim.factors` updates, and those whose gradient is projected, have an optimizer of their own.

    Args:
        pieces: All pieces of this rank; the attribute `pieces` leaves out empty ones.
        optim: Optimizer settings.
        all_reduce_max: Synchronizes the scales of quantization groups that several ranks share.
        share: Computes new projections of gradients, each on one of the ranks.
        whole_matrices: How the optimizer of `optim.factors` reaches whole matrices.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        optim: OptimConfig,
        all_reduce_max: AllReduceMax | None = None,
        share: Share = compute_all,
        whole_matrices: WholeMatrices | None = None,
    ) -> None:
        self.pieces = [piece for piece in pieces if piece.parameter.numel()]
        self._optim = optim
        optimized = [piece for piece in pieces if piece.parameter.numel() or _has_collectives(piece, optim)]
        named = [(piece.name, piece.parameter) for piece in optimized]
        ranges = {piece.name: piece.range for piece in optimized}
        # There may be no pieces: with more ranks than rows, or with a remainder that is sharded.
        groups = by_optimizer(named, optim) if optim.update == "whole" else [[pair] for pair in named]
        self._optimizers = [
            make_optimizer(
                group, optim, ranges=ranges, all_reduce_max=all_reduce_max, share=share, whole_matrices=whole_matrices
            )
            for group in groups
        ]
        self._optimizer_of = {
            name: optimizer for group, optimizer in zip(groups, self._optimizers, strict=True) for name, _ in group
        }

    def gradients(self) -> list[Tensor]:
        """Returns the gradients of all pieces that have one."""
        return [p.parameter.grad for p in self.pieces if p.parameter.grad is not None]

    def states(self) -> list[Tensor]:
        """Returns all optimizer states except step counters."""
        pairs = ((self._optimizer_of[piece.name], piece.parameter) for piece in self.pieces)
        return [state for optimizer, parameter in pairs for state in state_tensors(optimizer, parameter).values()]

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of all parameter groups."""
        return [rate for optimizer in self._optimizers for rate in learning_rates(optimizer)]

    def update(self, lr: float) -> None:
        """Runs the optimizer step and frees the gradients."""
        for optimizer in self._optimizers:
            _step(optimizer, lr)

    def discard(self, lr: float) -> None:
        """Frees the gradients without an update, which counts as one."""
        for optimizer in self._optimizers:
            set_lr(optimizer, lr)
            count_step(optimizer)
            optimizer.zero_grad(set_to_none=True)

    def step(self, piece: Piece, lr: float) -> None:
        """Updates one piece and frees its gradient (`optim.update: per_layer`); does nothing if it has no optimizer."""
        if piece.name in self._optimizer_of:
            _step(self._optimizer_of[piece.name], lr)

    def saved_ranges(self) -> Iterator[SavedRange]:
        """Yields the pieces that this rank saves, with their optimizer states."""
        for piece in self.pieces:
            if not piece.saved:
                continue
            for ending, part in parts_of(piece.parameter).items():
                saved = TensorRange.whole("", tuple(part.shape)) if ending else piece.range  # int8 is never sharded
                yield replace(saved, name=f"model.{piece.name}{ending}"), part.reshape(-1)
            optimizer = self._optimizer_of[piece.name]
            for stored, state in saved_states(optimizer, piece.parameter, piece.range, self._optim):
                if state.numel():
                    first, name = stored.range.start + stored.skip, f"optim.{piece.name}.{stored.range.name}"
                    yield TensorRange(name, stored.range.shape, first, state.numel()), state

    def load(self, read: ReadRange, step: int, cleared_at: ClearedAt = never_cleared) -> None:
        """Loads all pieces and their optimizer states from a checkpoint made after `step` updates."""
        for piece in self.pieces:
            parameter = piece.parameter
            load_values(read, piece.name, parameter, piece.range.start)
            has_states = step > 0 and parameter.requires_grad
            kept = stored_states(piece.range, self._optim, parameter.element_size()) if has_states else []
            ranges = (stored.range for stored in kept)
            states = {part.name: read(f"optim.{piece.name}.{part.name}", part.start, part.count) for part in ranges}
            adopt_state(self._optimizer_of[piece.name], parameter, states, step, cleared_at(piece.name))

    def held_ranges(self, name: str) -> Iterator[SavedRange]:
        """Yields this rank's piece of a parameter, if it is the rank that saves it; see :class:`Engine`."""
        for piece in self._named(name):
            if piece.saved:
                yield piece.range, self._exact_values(piece)

    @torch.no_grad()
    def set_values(self, name: str, values: Tensor) -> None:
        """Sets this rank's piece of a parameter; see :class:`Engine`."""
        for piece in self._named(name):
            mine = values[piece.range.start : piece.range.stop]
            masters = master_weights(self._optimizer_of[name], piece.parameter)
            if masters is not None:
                masters.copy_(mine)
            piece.parameter.copy_(mine.view(piece.parameter.shape))

    def clear_states(self, chosen: Callable[[str], bool]) -> None:
        """Clears the optimizer states of the parameters whose names are chosen."""
        for piece in self.pieces:
            if chosen(piece.name):
                clear_states(self._optimizer_of[piece.name], piece.parameter)

    def _named(self, name: str) -> Iterator[Piece]:
        return (piece for piece in self.pieces if piece.name == name)

    def _exact_values(self, piece: Piece) -> Tensor:
        """Returns the values of a piece, flat: its master weights if it has any, and those of int8 in float32."""
        masters = master_weights(self._optimizer_of[piece.name], piece.parameter)
        return plain(piece.parameter, torch.float32).detach().reshape(-1) if masters is None else masters


class Replicated(LocalPieces):
    """Parameters that are replicated on every rank: all of them with ddp, the dense remainder with
    `parallel.shard: factors`.

    Args:
        parameters: Named parameters.
        optim: Optimizer settings.
        rank: This rank, which saves every world_size-th parameter.
        world_size: Number of ranks.
        whole_matrices: See :class:`LocalPieces`.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        optim: OptimConfig,
        rank: int,
        world_size: int,
        whole_matrices: WholeMatrices | None = None,
    ) -> None:
        self.world_size = world_size
        pieces = (
            Piece(TensorRange.whole(name, tuple(parameter.shape)), parameter, index % world_size == rank)
            for index, (name, parameter) in enumerate(parameters)
        )
        share = partial(_deal_out, rank, world_size)
        super().__init__(list(pieces), optim, share=share, whole_matrices=whole_matrices)

    def all_reduce(self, scale: float = 1.0) -> None:
        """All-reduces the gradients, in one flat message per data type, and multiplies them by `scale`."""
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


def _deal_out(rank: int, world_size: int, jobs: Sequence[Job]) -> None:
    """Computes tensors, each on one rank, and sends them to all. All ranks pass the same tensors in the same order."""
    compute_all(jobs[rank::world_size])
    if world_size > 1:
        for number, (tensor, _) in enumerate(jobs):
            dist.broadcast(tensor, number % world_size)


def _has_collectives(piece: Piece, optim: OptimConfig) -> bool:
    """Returns whether the update of a piece is a collective, in which a rank without values of it takes part too."""
    return is_orthogonalized(piece.name, optim) or bool(shared_groups(piece.range, optim.state_bits))


def _step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def load_values(read: ReadRange, name: str, parameter: Tensor, start: int = 0) -> None:
    """Loads a piece of a named parameter, which begins at `start` in the flattened parameter, from a checkpoint."""
    for ending, part in parts_of(parameter).items():
        read_into(part, read, f"model.{name}{ending}", start)


def read_into(tensor: Tensor, read: ReadRange, name: str, start: int) -> None:
    """Fills a detached, contiguous tensor with the values of a named tensor from `start` on, chunk by chunk."""
    flat = tensor.view(-1)
    for first, stop in chunks(flat.numel()):
        flat[first:stop].copy_(read(name, start + first, stop - first))
