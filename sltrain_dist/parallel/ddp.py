"""The `ddp` engine: replicas with torch's DistributedDataParallel, or the plain model on a single rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
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
from sltrain_dist.parallel.pieces import ClearedAt, ReadRange, Replicated, SavedRange, never_cleared
from sltrain_dist.parallel.whole_layers import whole_matrices
from sltrain_dist.runtime.environment import Environment


class DDPEngine:
    """The `ddp` engine. With one rank it is plain single-process training and needs no process group.

    Args:
        model: The model, identical on every rank. A model on the meta device is allocated here; :meth:`load` sets its
            values.
        optim: Optimizer settings.
        env: The distributed environment.
    """

    def __init__(self, model: LlamaForCausalLM, optim: OptimConfig, env: Environment) -> None:
        materialise(model, partial(torch.empty_like, device=env.device))
        self._env = env
        self._module = model
        self._lr, self._clip = optim.lr, optim.clip
        whole = whole_matrices(model, env, copies=env.world_size)
        self._replicas = Replicated(list(model.named_parameters()), optim, env.rank, env.world_size, whole)
        self._in_backward: InBackward | None = None
        self._ddp: DistributedDataParallel | None = None
        if optim.update == "per_layer":
            # Without DDP, whose buckets would keep the gradients of all parameters.
            self._in_backward = InBackward(optim, env)
            self._in_backward.watch_whole(self._replicas)
        elif env.world_size > 1:
            # torch 2.13 deprecates broadcast_buffers in favour of an argument that torch 2.11 does not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._ddp = DistributedDataParallel(
                model,
                device_ids=[env.device] if env.device.type == "cuda" else None,
                init_sync=False,  # every rank computes the same initial values, supports and rotary tables
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._module

    def begin_update(self, lr: float, previous_norm: float | None) -> None:
        """Sets the learning rate, and the norm that per-layer updates clip by."""
        self._lr = lr
        if self._in_backward is not None:
            self._in_backward.begin_update(lr, previous_norm)

    def micro_step(
        self, input_ids: Tensor, labels: Tensor, weight: float, *, last: bool, positions: Tensor | None = None
    ) -> Tensor:
        """Runs forward and backward; gradients are all-reduced during the backward pass of the last micro-batch."""
        if self._in_backward is not None:
            return self._in_backward.run(
                lambda: backward_of(self._module, input_ids, labels, positions, weight), last=last
            )
        with self._ddp.no_sync() if self._ddp is not None and not last else nullcontext():
            # DDP averages over ranks, but engines must return sums.
            return backward_of(self._ddp or self._module, input_ids, labels, positions, weight * self._env.world_size)

    def clip_gradients(self) -> float:
        """Clips the gradients, which are identical on all ranks, and returns their norm before clipping."""
        if self._in_backward is not None:
            return self._in_backward.norm()
        gradients = self._replicas.gradients()
        norm = float(squared_norm(gradients, self._env.device).sqrt())
        scale_down(gradients, norm, self._clip)
        return norm

    def update(self) -> None:
        """Runs the optimizer step and frees the gradients."""
        if self._in_backward is None:
            self._replicas.update(self._lr)

    def discard(self) -> None:
        """Frees the gradients without an update."""
        if self._in_backward is None:
            self._replicas.discard(self._lr)

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns the summed loss of a batch."""
        return self._module(input_ids, labels, positions)

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Returns the logits of one token in each row."""
        return self._module(input_ids, at=last)

    def saved_ranges(self) -> Iterator[SavedRange]:
        """Yields the parameters that this rank saves, with their optimizer states."""
        return self._replicas.saved_ranges()

    def load(self, read: ReadRange, step: int, cleared_at: ClearedAt = never_cleared) -> None:
        """Loads all parameters and optimizer states on every rank."""
        self._replicas.load(read, step, cleared_at)

    def free_gathered(self) -> None:
        """Does nothing: parameters are never gathered."""

    def held_ranges(self, name: str) -> Iterator[SavedRange]:
        """Yields the whole parameter on the rank that saves it."""
        return self._replicas.held_ranges(name)

    def set_values(self, name: str, values: Tensor) -> None:
        """Sets the whole parameter on every rank."""
        self._replicas.set_values(name, values)

    def clear_states(self, chosen: Callable[[str], bool]) -> None:
        """Clears the states of the chosen parameters on every rank."""
        self._replicas.clear_states(chosen)

    def tensors(self) -> dict[Kind, list[Tensor]]:
        """Returns all tensors; every rank has all of them."""
        return {
            "parameters": [part for p in self._module.parameters() for part in parts_of(p).values()],
            "gradients": self._replicas.gradients(),
            "states": self._replicas.states(),
        }

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of the optimizer's parameter groups."""
        return self._replicas.learning_rates()

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every parameter by name; int8 weights as codes and scales."""
        for piece in self._replicas.pieces:
            yield from ((f"{piece.name}{ending}", part) for ending, part in parts_of(piece.parameter).items())
