"""`optim.update: per_layer`: each parameter is updated during the backward pass, as soon as its gradient is complete
over micro-batches and ranks, and the gradient is freed.

A hook runs when a parameter's gradient has been accumulated (FSDP2: when the shard's gradient has been reduced).
Autograd reaches parameters in the same order on every rank, so that the collectives in the hooks match.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.optim.clipping import PerLayerClip
from sltrain_dist.parallel.engine import squared_norm
from sltrain_dist.parallel.pieces import LocalPieces, Piece
from sltrain_dist.runtime.environment import Environment

_IN_FLIGHT_BYTES = 1 << 25
"""Most bytes of gradients in flight. Enough to keep a link busy during the backward pass, and small compared to the
weights of any model that needs per-layer updates."""


class Phase(Enum):
    """The treatment of a gradient by the hooks."""

    KEEP = "keep"
    """Keep it, because more micro-batches follow."""
    MEASURE = "measure"
    """Add its square to the norm, and free it."""
    STEP = "step"
    """Update its parameter, and free it."""


@dataclass(frozen=True)
class _InFlight:
    """A gradient whose all-reduce is in progress."""

    owner: LocalPieces
    piece: Piece
    work: dist.Work


class InBackward:
    """The updates of pieces of parameters during the backward pass.

    Args:
        optim: Optimizer settings.
        env: The distributed environment.
        copies: Number of ranks with the same shards.
    """

    def __init__(self, optim: OptimConfig, env: Environment, *, copies: int = 1) -> None:
        self._clip, self._env, self._copies = PerLayerClip(optim), env, copies
        self._lr, self._phase = optim.lr, Phase.KEEP
        self._takes_two_passes = optim.passes_twice
        self._in_flight: deque[_InFlight] = deque()
        self._reset()

    def watch_whole(self, pieces: LocalPieces) -> None:
        """Registers hooks that all-reduce the gradients of replicated parameters and update these."""
        for piece in (piece for piece in pieces.pieces if piece.parameter.requires_grad):
            piece.parameter.register_post_accumulate_grad_hook(partial(self._whole_is_ready, pieces, piece))

    def watch_shards(self, pieces: LocalPieces, shards: Iterable[tuple[Piece, Tensor]]) -> None:
        """Registers hooks that update sharded parameters.

        Args:
            pieces: The pieces of this rank with their optimizers.
            shards: All pieces of this rank, including empty ones, each with the DTensor that receives its gradient,
                already summed over the ranks.
        """
        for piece, parameter in shards:
            parameter.register_post_accumulate_grad_hook(partial(self._shard_is_ready, pieces, piece))

    def begin_update(self, lr: float, previous_norm: float | None) -> None:
        """See :meth:`sltrain_dist.parallel.engine.Engine.begin_update`."""
        self._lr = lr
        self._clip.begin_update(previous_norm)
        self._reset()

    def run(self, backward: Callable[[], Tensor], *, last: bool) -> Tensor:
        """Runs the forward and backward pass of a micro-batch; the `last` one updates the parameters.

        If clipping takes two passes and the norm is not finite, nothing is updated.

        Args:
            backward: Runs forward and backward and returns the loss; called twice if clipping takes two passes.
            last: Whether this is the last micro-batch of the update.
        """
        if last and self._takes_two_passes:
            loss = self._pass(backward, Phase.MEASURE)
            norm = self.norm()
            if not math.isfinite(norm):
                return loss
            self._clip.norm = norm
            self._reset()
        return self._pass(backward, Phase.STEP if last else Phase.KEEP)

    def norm(self) -> float:
        """Returns the global norm of the gradients before clipping, the same on every rank."""
        shards, whole = (torch.stack(squares).sum() if squares else self._zero() for squares in self._squares)
        if self._env.world_size > 1:
            dist.all_reduce(shards)
        return float((shards / self._copies + whole).sqrt())

    def _pass(self, backward: Callable[[], Tensor], phase: Phase) -> Tensor:
        self._phase = phase
        try:
            loss = backward()
            self._finish_reductions(0)
        finally:
            self._phase = Phase.KEEP
        return loss

    def _whole_is_ready(self, owner: LocalPieces, piece: Piece, parameter: Tensor) -> None:
        if self._phase is Phase.KEEP:
            return
        gradient = parameter.grad
        assert gradient is not None  # guaranteed by autograd
        if self._env.world_size == 1:
            self._use(owner, piece, gradient, sharded=False)
            return
        work = dist.all_reduce(gradient, async_op=True)
        assert work is not None  # this rank is in the group
        self._in_flight.append(_InFlight(owner, piece, work))
        self._finish_reductions(_IN_FLIGHT_BYTES)

    def _finish_reductions(self, at_most: int) -> None:
        """Waits for all-reduces and uses their gradients, oldest first, until at most `at_most` bytes are in flight."""
        while sum(reduction.piece.parameter.nbytes for reduction in self._in_flight) > at_most:
            reduction = self._in_flight.popleft()
            reduction.work.wait()
            gradient = reduction.piece.parameter.grad
            assert gradient is not None  # the all-reduce is in place
            self._use(reduction.owner, reduction.piece, gradient, sharded=False)

    def _shard_is_ready(self, owner: LocalPieces, piece: Piece, parameter: Tensor) -> None:
        if self._phase is Phase.KEEP:
            return
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)  # guaranteed by FSDP2
        parameter.grad = None
        self._use(owner, piece, gradient.to_local(), sharded=True)

    @torch.no_grad()
    def _use(self, owner: LocalPieces, piece: Piece, gradient: Tensor, *, sharded: bool) -> None:
        """Adds a gradient to the norm, updates its parameter in phase STEP, and frees it."""
        square = squared_norm([gradient], self._env.device)
        self._squares[0 if sharded else 1].append(square)
        piece.parameter.grad = None
        if self._phase is Phase.STEP:
            self._clip.apply(gradient, partial(self._square_over_shards, square) if sharded else lambda: square)
            piece.parameter.grad = gradient
            owner.step(piece, self._lr)
            piece.parameter.grad = None

    def _square_over_shards(self, square: Tensor) -> Tensor:
        total = square.clone()
        if self._env.world_size > 1:
            dist.all_reduce(total)
        return total / self._copies

    def _reset(self) -> None:
        self._squares: tuple[list[Tensor], list[Tensor]] = ([], [])

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self._env.device)
