"""`optim.update: per_layer`: parameters are updated during the backward pass, each as soon as its gradient is
complete over micro-batches and ranks, and the gradient is freed.

A hook runs when a parameter's gradient has been accumulated (FSDP2: when the shard's has been reduced). Autograd
reaches parameters in the same order on every rank, so that the collectives of the hooks meet.
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
from sltrain_dist.parallel.pieces import Held, Piece
from sltrain_dist.runtime.environment import Environment

_IN_FLIGHT_BYTES = 1 << 25
"""Gradients that may be on their way at a time. Enough to keep a link busy while the backward pass goes on, and
small beside the weights of any model that needs per-layer updates."""


class Phase(Enum):
    """What is done with a complete gradient."""

    KEEP = "keep"
    """Nothing: more micro-batches follow."""
    MEASURE = "measure"
    """Its norm is added up, and it is freed."""
    STEP = "step"
    """Its parameter is updated, and it is freed."""


@dataclass(frozen=True)
class _Sent:
    """A gradient that is being summed over ranks."""

    held: Held
    piece: Piece
    work: dist.Work


class InBackward:
    """Updates of pieces of parameters from within the backward pass.

    Args:
        optim: Optimizer settings.
        env: This process among all.
        copies: Ranks that hold the same shards.
    """

    def __init__(self, optim: OptimConfig, env: Environment, *, copies: int = 1) -> None:
        self._clip, self._env, self._copies = PerLayerClip(optim), env, copies
        self._lr, self._phase = optim.lr, Phase.KEEP
        self._takes_two_passes = optim.passes_twice
        self._sent: deque[_Sent] = deque()
        self._reset()

    def watch_whole(self, held: Held) -> None:
        """Updates parameters that are whole on every rank; their gradients are summed over the ranks first."""
        for piece in held.pieces:
            piece.parameter.register_post_accumulate_grad_hook(partial(self._whole_is_ready, held, piece))

    def watch_shards(self, held: Held, shards: Iterable[tuple[Piece, Tensor]]) -> None:
        """Updates sharded parameters.

        Args:
            held: What steps the pieces.
            shards: Every piece of this rank, empty ones included, and the DTensor that gets its gradient, already
                summed over the ranks.
        """
        for piece, parameter in shards:
            parameter.register_post_accumulate_grad_hook(partial(self._shard_is_ready, held, piece))

    def begin_update(self, lr: float, previous_norm: float | None) -> None:
        """See :meth:`sltrain_dist.parallel.engine.Engine.begin_update`."""
        self._lr = lr
        self._clip.begin_update(previous_norm)
        self._reset()

    def run(self, backward: Callable[[], Tensor], *, last: bool) -> Tensor:
        """Makes a micro-batch's forward and backward pass, the `last` one with the updates in it.

        Where clipping takes two passes and the norm is not finite, nothing is updated.

        Args:
            backward: Makes them, and returns the loss; called twice where clipping takes two passes.
            last: Whether it is the update's last micro-batch.
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
        """The global norm of the gradients before clipping, the same on every rank."""
        shards, whole = (torch.stack(squares).sum() if squares else self._zero() for squares in self._squares)
        if self._env.world_size > 1:
            dist.all_reduce(shards)
        return float((shards / self._copies + whole).sqrt())

    def _pass(self, backward: Callable[[], Tensor], phase: Phase) -> Tensor:
        self._phase = phase
        try:
            loss = backward()
            self._receive(0)
        finally:
            self._phase = Phase.KEEP
        return loss

    def _whole_is_ready(self, held: Held, piece: Piece, parameter: Tensor) -> None:
        if self._phase is Phase.KEEP:
            return
        gradient = parameter.grad
        assert gradient is not None  # autograd's promise
        if self._env.world_size == 1:
            self._use(held, piece, gradient, sharded=False)
            return
        work = dist.all_reduce(gradient, async_op=True)
        assert work is not None  # not outside of its group
        self._sent.append(_Sent(held, piece, work))
        self._receive(_IN_FLIGHT_BYTES)

    def _receive(self, at_most: int) -> None:
        """Uses gradients that were sent, the oldest first, until `at_most` bytes are on their way."""
        while sum(sent.piece.parameter.nbytes for sent in self._sent) > at_most:
            sent = self._sent.popleft()
            sent.work.wait()
            gradient = sent.piece.parameter.grad
            assert gradient is not None  # it was sent
            self._use(sent.held, sent.piece, gradient, sharded=False)

    def _shard_is_ready(self, held: Held, piece: Piece, parameter: Tensor) -> None:
        if self._phase is Phase.KEEP:
            return
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)  # FSDP2's promise
        parameter.grad = None
        self._use(held, piece, gradient.to_local(), sharded=True)

    @torch.no_grad()
    def _use(self, held: Held, piece: Piece, gradient: Tensor, *, sharded: bool) -> None:
        """Adds a gradient to the norm, and updates its parameter or not."""
        square = squared_norm([gradient], self._env.device)
        self._squares[0 if sharded else 1].append(square)
        piece.parameter.grad = None
        if self._phase is Phase.STEP:
            self._clip.apply(gradient, partial(self._over_shards, square) if sharded else lambda: square)
            piece.parameter.grad = gradient
            held.step(piece, self._lr)
            piece.parameter.grad = None

    def _over_shards(self, square: Tensor) -> Tensor:
        total = square.clone()
        if self._env.world_size > 1:
            dist.all_reduce(total)
        return total / self._copies

    def _reset(self) -> None:
        self._squares: tuple[list[Tensor], list[Tensor]] = ([], [])

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self._env.device)
