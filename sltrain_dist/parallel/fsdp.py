"""The `fsdp` engine: PyTorch's FSDP2, where each decoder layer is gathered only for its forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sltrain_dist.config.rules import check_replicas
from sltrain_dist.config.schema import Config
from sltrain_dist.models.build import materialise
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.parallel.engine import Kind, backward_of, clip_shards
from sltrain_dist.parallel.per_layer import InBackward
from sltrain_dist.parallel.pieces import (
    ClearedAt,
    LocalPieces,
    Piece,
    ReadRange,
    Replicated,
    SavedRange,
    never_cleared,
)
from sltrain_dist.parallel.placement import fsdp_range, is_sharded
from sltrain_dist.parallel.whole_layers import whole_matrices
from sltrain_dist.runtime.environment import Environment


class FSDPEngine:
    """The `fsdp` engine: parameters, gradients and optimizer states are sharded by rows.

    With `parallel.shard: factors`, FSDP2 ignores the dense remainder (embedding, head, norms), which is replicated as
    plain parameters; its gradients are all-reduced once per update. The optimizer updates plain tensors that share
    the shards' memory, so that torch's fused optimizers can be used and the states are not DTensors.

    Args:
        model: The model, identical on every rank. For a model on the meta device, each rank allocates only its shards
            and the remainder, whose values :meth:`load` sets; otherwise every rank first needs memory for the whole
            model.
        config: The configuration.
        env: The distributed environment, with a process group.

    Raises:
        ConfigError: `parallel.replicas` does not divide the ranks into equal groups.
    """

    def __init__(self, model: LlamaForCausalLM, config: Config, env: Environment) -> None:
        parallel = config.parallel
        self._env, self._model, self._copies = env, model, parallel.replicas
        named = list(model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        check_replicas(parallel, env.world_size)
        mesh = _mesh(parallel.replicas, env)
        self._shard(mesh, config, {parameter for n, parameter in named if not is_sharded(n, parallel.shard)})
        materialise(model, self._empty if parallel.cpu_offload else partial(torch.empty_like, device=env.device))
        remainder = [(n, p) for n, p in model.named_parameters() if not is_sharded(n, parallel.shard)]
        self._sync_each = not parallel.accumulates_locally

        rank, ranks = env.rank % (env.world_size // self._copies), env.world_size // self._copies
        self._dtensors = [
            (name, cast(DTensor, parameter))
            for name, parameter in model.named_parameters()
            if is_sharded(name, parallel.shard)
        ]
        pieces = []
        for name, parameter in self._dtensors:
            local, part = parameter.to_local(), fsdp_range(name, shapes[name], rank, ranks)
            if local.numel() != part.count:
                raise AssertionError(f"{name}: FSDP2 has {local.numel()} values here, fsdp_range() says {part.count}")
            pieces.append(Piece(part, _leaf(local), env.rank < ranks))
        whole = whole_matrices(model, env, copies=self._copies)
        self._shards = LocalPieces(pieces, config.optim, self._max_over_ranks, whole_matrices=whole)
        self._leaves = {piece.name: piece.parameter for piece in self._shards.pieces}
        self._remainder = Replicated(remainder, config.optim, env.rank, env.world_size)
        self._lr, self._clip = config.optim.lr, config.optim.clip
        self._in_backward: InBackward | None = None
        if config.optim.update == "per_layer":
            self._in_backward = InBackward(config.optim, env, copies=self._copies)
            shards = [(piece, dtensor) for piece, (_, dtensor) in zip(pieces, self._dtensors, strict=True)]
            self._in_backward.watch_shards(self._shards, shards)
            self._in_backward.watch_whole(self._remainder)

    @property
    def module(self) -> nn.Module:
        """The model, with DTensors for its sharded parameters."""
        return self._model

    @property
    def _root(self) -> FSDPModule:
        return cast(FSDPModule, self._model)

    @property
    def _sharded_modules(self) -> list[FSDPModule]:
        """The decoder layers and the root, which FSDP2 gathers one by one."""
        return [cast(FSDPModule, module) for module in (*self._model.model.layers, self._model)]

    def begin_update(self, lr: float, previous_norm: float | None) -> None:
        """Sets the learning rate, and the norm that per-layer updates clip by."""
        self._lr = lr
        if self._in_backward is not None:
            self._in_backward.begin_update(lr, previous_norm)

    def micro_step(
        self, input_ids: Tensor, labels: Tensor, weight: float, *, last: bool, positions: Tensor | None = None
    ) -> Tensor:
        """Runs forward and backward; gradients are reduce-scattered at each micro-batch, or only at the last."""
        self._root.set_requires_gradient_sync(last or self._sync_each)
        if self._in_backward is not None:
            return self._in_backward.run(
                lambda: backward_of(self._model, input_ids, labels, positions, weight), last=last
            )
        loss = backward_of(self._model, input_ids, labels, positions, weight)
        if last:
            self._remainder.all_reduce()
            for name, parameter in self._dtensors:
                gradient = parameter.grad
                if gradient is not None and name in self._leaves:
                    self._leaves[name].grad = cast(DTensor, gradient).to_local()
        return loss

    def clip_gradients(self) -> float:
        """Clips by the norm over the shards of all ranks and, counted once, the remainder; returns the norm before."""
        if self._in_backward is not None:
            return self._in_backward.norm()
        shards, whole = self._shards.gradients(), self._remainder.gradients()
        return clip_shards(shards, whole, self._clip, self._env, copies=self._copies)

    def update(self) -> None:
        """Runs the optimizer steps of shards and remainder, and frees the gradients."""
        if self._in_backward is not None:
            return
        self._shards.update(self._lr)
        self._remainder.update(self._lr)
        self._free_gradients()

    def discard(self) -> None:
        """Frees the gradients without an update."""
        if self._in_backward is not None:
            return
        self._shards.discard(self._lr)
        self._remainder.discard(self._lr)
        self._free_gradients()

    def _free_gradients(self) -> None:
        for _, parameter in self._dtensors:
            parameter.grad = None

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns the summed loss of a batch."""
        loss = self._model(input_ids, labels, positions)
        self._root.reshard()  # otherwise only a backward pass frees the root's own parameters
        return loss

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Returns the logits of one token in each row."""
        logits = self._model(input_ids, at=last)
        self._root.reshard()
        return logits

    def saved_ranges(self) -> Iterator[SavedRange]:
        """Yields this rank's shards, unless another rank saves the same ones, and its share of the remainder."""
        yield from self._shards.saved_ranges()
        yield from self._remainder.saved_ranges()

    def load(self, read: ReadRange, step: int, cleared_at: ClearedAt = never_cleared) -> None:
        """Loads this rank's shards and the remainder from a checkpoint."""
        self._shards.load(read, step, cleared_at)
        self._remainder.load(read, step, cleared_at)

    def free_gathered(self) -> None:
        """Frees layers that an evaluation with `parallel.reshard_after_forward=false` has left gathered."""
        for module in self._sharded_modules:
            module.reshard()

    def held_ranges(self, name: str) -> Iterator[SavedRange]:
        """Yields this rank's shard, unless another rank saves the same one."""
        yield from self._shards.held_ranges(name)
        yield from self._remainder.held_ranges(name)

    def set_values(self, name: str, values: Tensor) -> None:
        """Sets this rank's shard."""
        self._shards.set_values(name, values)
        self._remainder.set_values(name, values)

    def clear_states(self, chosen: Callable[[str], bool]) -> None:
        """Clears this rank's part of the states of the chosen parameters."""
        self._shards.clear_states(chosen)
        self._remainder.clear_states(chosen)

    def tensors(self) -> dict[Kind, list[Tensor]]:
        """Returns the shards and the remainder, without currently gathered weights."""
        parts = (self._shards, self._remainder)
        accumulated = [p.grad.to_local() for _, p in self._dtensors if isinstance(p.grad, DTensor)]
        return {
            "parameters": [
                *(parameter.to_local() for _, parameter in self._dtensors),
                *(piece.parameter for piece in self._remainder.pieces),
            ],
            "gradients": [*(g for part in parts for g in part.gradients()), *accumulated],
            "states": [state for part in parts for state in part.states()],
        }

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of the optimizers of shards and remainder."""
        return [*self._shards.learning_rates(), *self._remainder.learning_rates()]

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters of the remainder."""
        yield from ((piece.name, piece.parameter.detach()) for piece in self._remainder.pieces)

    def _empty(self, meta: Tensor) -> Tensor:
        """Allocates a parameter or buffer; shards on the host, as for CPU offload."""
        return torch.empty_like(meta, device="cpu" if isinstance(meta, DTensor) else self._env.device)

    def _max_over_ranks(self, largest: Tensor) -> None:
        """Takes the maximum over all ranks, in place. Groups of replicas contribute the same values."""
        on_device = largest.to(self._env.device)
        dist.all_reduce(on_device, dist.ReduceOp.MAX)
        largest.copy_(on_device)

    def _shard(self, mesh: DeviceMesh, config: Config, ignored: set[nn.Parameter]) -> None:
        """Shards every decoder layer, then the root module, which gathers the rest: embedding, last norm and head."""
        parallel, cuda = config.parallel, self._env.device.type == "cuda"
        mixed = config.train.precision.is_mixed
        # The linear layers cast their own input; casting a decoder layer's input would round the residual stream.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if mixed else None,
            reduce_dtype=torch.float32 if mixed else None,
            cast_forward_inputs=False,
        )
        offload = CPUOffloadPolicy(pin_memory=cuda) if parallel.cpu_offload else OffloadPolicy()
        layers = list(self._model.model.layers)
        for layer in layers:
            fully_shard(
                layer,
                mesh=mesh,
                reshard_after_forward=parallel.reshard_after_forward,
                mp_policy=policy,
                offload_policy=offload,
                ignored_params=ignored,
            )
        fully_shard(self._model, mesh=mesh, offload_policy=offload, ignored_params=ignored)
        wrapped = self._sharded_modules
        for module in wrapped:
            # Engines return sums of gradients, and gloo does not support averages.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        ahead = parallel.prefetch_blocks
        for i in range(len(layers)):
            wrapped[i].set_modules_to_forward_prefetch(wrapped[i + 1 : min(i + 1 + ahead, len(layers))])
            wrapped[i].set_modules_to_backward_prefetch(wrapped[max(0, i - ahead) : i][::-1])


def _mesh(replicas: int, env: Environment) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(env.device.type, (env.world_size,))
    return init_device_mesh(
        env.device.type, (replicas, env.world_size // replicas), mesh_dim_names=("replicate", "shard")
    )


def _leaf(local: Tensor) -> nn.Parameter:
    """Returns a leaf parameter that shares the shard's memory."""
    return nn.Parameter(local.detach())
