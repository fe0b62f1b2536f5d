"""Whole replicas on every rank: torch's DistributedDataParallel, or nothing at all on one rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.models.build import materialise
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.numerics.int8_weight import parts_of
from sltrain_dist.parallel.engine import Kind, backward_of, scale_down, squared_norm
from sltrain_dist.parallel.per_layer import InBackward
from sltrain_dist.parallel.pieces import Chunk, ReadChunk, Replicated
from sltrain_dist.runtime.environment import Environment


class DDPEngine:
    """The `ddp` engine. One rank needs no process group and is plain single-process training.

    Args:
        model: The model, equal on every rank. On the meta device it gets memory here, whose values
            :meth:`load` sets.
        optim: Optimizer settings.
        env: This process among all.
    """

    def __init__(self, model: LlamaForCausalLM, optim: OptimConfig, env: Environment) -> None:
        materialise(model, partial(torch.empty_like, device=env.device))
        self._env = env
        self._module = model
        self._lr, self._clip = optim.lr, optim.clip
        self._replicas = Replicated(list(model.named_parameters()), optim, env.rank, env.world_size)
        self._in_backward: InBackward | None = None
        self._ddp: DistributedDataParallel | None = None
        if optim.update == "per_layer":
            # In place of DDP, whose buckets hold the gradients of all parameters.
            self._in_backward = InBackward(optim, env)
            self._in_backward.watch_whole(self._replicas)
        elif env.world_size > 1:
            # torch 2.13 deprecates it for an argument that torch 2.11 does not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._ddp = DistributedDataParallel(
                model,
                device_ids=[env.device] if env.device.type == "cuda" else None,
                init_sync=False,  # initial values, supports and rotary tables are computed, equal everywhere
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._module

    def begin_update(self, lr: float, previous_norm: float | None) -> None:
        """Takes the learning rate, and what per-layer updates clip by."""
        self._lr = lr
        if self._in_backward is not None:
            self._in_backward.begin_update(lr, previous_norm)

    def micro_step(
        self, input_ids: Tensor, labels: Tensor, weight: float, *, last: bool, positions: Tensor | None = None
    ) -> Tensor:
        """Forward and backward; the all-reduce overlaps the backward pass of the last micro-batch alone."""
        if self._in_backward is not None:
            return self._in_backward.run(
                lambda: backward_of(self._module, input_ids, labels, positions, weight), last=last
            )
        with self._ddp.no_sync() if self._ddp is not None and not last else nullcontext():
            # DDP averages over ranks; gradients here are sums.
            return backward_of(self._ddp or self._module, input_ids, labels, positions, weight * self._env.world_size)

    def clip_gradients(self) -> float:
        """The gradient norm, the same on every rank because every rank holds the same gradients."""
        if self._in_backward is not None:
            return self._in_backward.norm()
        gradients = self._replicas.gradients()
        norm = float(squared_norm(gradients, self._env.device).sqrt())
        scale_down(gradients, norm, self._clip)
        return norm

    def update(self) -> None:
        """Makes the optimizer's step and clears the gradients."""
        if self._in_backward is None:
            self._replicas.update(self._lr)

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """The summed loss of a batch."""
        return self._module(input_ids, labels, positions)

    def chunks(self) -> Iterator[Chunk]:
        """This rank's share of the replicas."""
        return self._replicas.chunks()

    def load(self, read: ReadChunk, step: int) -> None:
        """Takes parameters and states from a checkpoint, on every rank."""
        self._replicas.load(read, step)

    def tensors(self) -> dict[Kind, list[Tensor]]:
        """All of them whole."""
        return {
            "parameters": [part for p in self._module.parameters() for part in parts_of(p).values()],
            "gradients": self._replicas.gradients(),
            "states": self._replicas.states(),
        }

    def learning_rates(self) -> list[float]:
        """Of the optimizer's groups."""
        return self._replicas.learning_rates()

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter."""
        for piece in self._replicas.pieces:
            yield from ((f"{piece.name}{ending}", part) for ending, part in parts_of(piece.parameter).items())
