"""DeepSpeed ZeRO, stages 1 and 2. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.optim.factory import STATE_NAMES, adopt_state, make_optimizer, set_lr
from sltrain_dist.parallel.engine import (
    Chunk,
    ReadChunk,
    Replicated,
    clip_coefficient,
    load_parameter,
    squared_norm,
)
from sltrain_dist.parallel.environment import Environment
from sltrain_dist.parallel.partition import is_factor

_BUCKET = 50_000_000


def deepspeed_config(config: Config, world_size: int, sharded_numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration, written from ours, with nothing that matters left to its defaults.

    Args:
        config: The run.
        world_size: Number of ranks.
        sharded_numel: Values in the parameters that DeepSpeed is given.
    """
    train = config.train
    values: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": micro_batches_per_update(config, world_size),
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,  # left out, 0.19 clips at 1.0; clipping is done here, over all parameters
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": False,
            # Elements. The default of 5e8 would allocate 1 GB in bf16 for the smallest model too.
            "reduce_bucket_size": min(_BUCKET, sharded_numel),
            "allgather_bucket_size": min(_BUCKET, sharded_numel),
            "compute_grad_norm": False,  # its norm would leave the remainder out; ours is taken before the step
        },
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
    if train.dtype == "bf16":
        values["bf16"] = {
            "enabled": True,
            # Pure bf16, as under every other engine: no fp32 masters, states in bf16.
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
            "check_grad_overflow": False,  # the training step looks at the norm before it updates
        }
        values["data_types"] = {"grad_accum_dtype": "bf16"}
    return values


class ZeroEngine:
    """The `zero` engine: DeepSpeed shards the optimizer states (stage 1) and the gradients (stage 2).

    With `parallel.shard: factors` DeepSpeed is given the factors alone; the dense remainder's gradients
    stay local until one all-reduce per update, and its states are whole on every rank.

    Args:
        model: The model, on the environment's device, equal on every rank.
        config: The run.
        env: This process among all.

    Raises:
        ConfigError: deepspeed is not installed.
    """

    def __init__(self, model: nn.Module, config: Config, env: Environment) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(f"parallel.engine=zero needs deepspeed ({error}); install it, or use ddp") from None
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that torch 2.13 has renamed.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
        self._env = env
        named = list(model.named_parameters())
        everything = config.parallel.shard == "all"
        self._sharded = [(n, p) for n, p in named if everything or is_factor(n)]
        remainder = [(n, p) for n, p in named if not (everything or is_factor(n))]
        self._remainder = Replicated(remainder, config.optim, env.rank, env.world_size) if remainder else None
        self._state_names = STATE_NAMES[config.optim.name]
        self._optimizer = make_optimizer(self._sharded, config.optim)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=[p for _, p in self._sharded],
            optimizer=self._optimizer,
            config=deepspeed_config(config, env.world_size, sum(p.numel() for _, p in self._sharded)),
            dist_init_required=False,
        )

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._engine.module

    def micro_step(self, input_ids: Tensor, labels: Tensor, weight: float, *, last: bool) -> Tensor:
        """Forward and backward; DeepSpeed reduces the sharded gradients, the remainder's wait for the last."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(input_ids, labels)
        self._engine.backward(loss * weight, scale_wrt_gas=False)
        if last and self._remainder is not None:
            self._remainder.all_reduce()
        return loss.detach()

    def clip_gradients(self, max_norm: float) -> float:
        """The norm over the shards of all ranks, plus the remainder once."""
        total = squared_norm(self._shard_gradients(), self._env.device)
        dist.all_reduce(total)
        if self._remainder is not None:
            total = total + squared_norm(self._remainder.gradients(), self._env.device)
        norm = float(total.sqrt())
        coefficient = clip_coefficient(norm, max_norm)
        if coefficient < 1:
            torch._foreach_mul_(self._shard_gradients(), coefficient)
            if self._remainder is not None:
                torch._foreach_mul_(self._remainder.gradients(), coefficient)
        return norm

    def update(self, lr: float) -> None:
        """Makes both optimizers' steps and clears the gradients."""
        set_lr(self._optimizer, lr)
        self._engine.step()
        if self._remainder is not None:
            self._remainder.update(lr)

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The summed loss of a batch."""
        return self._engine.module(input_ids, labels)

    def chunks(self) -> Iterator[Chunk]:
        """The pieces of the sharded parameters whose states are here, and this rank's share of the rest."""
        for name, parameter, piece, flat, offset in self._pieces():
            shape = tuple(parameter.shape)
            local = slice(offset, offset + piece.numel)
            yield Chunk(f"model.{name}", shape, piece.start, flat.detach()[local])
            for key in self._state_names:
                if key in self._optimizer.state.get(flat, {}):
                    yield Chunk(f"optim.{name}.{key}", shape, piece.start, self._optimizer.state[flat][key][local])
        if self._remainder is not None:
            yield from self._remainder.chunks()

    def load(self, read: ReadChunk, step: int) -> None:
        """Takes whole weights, and this rank's pieces of masters and states, from a checkpoint."""
        for name, parameter in self._sharded:
            load_parameter(read, name, parameter)
        flats = {id(flat): flat for flat in self._zero.single_partition_of_fp32_groups}
        states = {i: {key: torch.zeros_like(flat.detach()) for key in self._state_names} for i, flat in flats.items()}
        for name, _, piece, flat, offset in self._pieces():
            local = slice(offset, offset + piece.numel)
            with torch.no_grad():
                flat[local].copy_(read(f"model.{name}", piece.start, piece.numel))
            for key in self._state_names if step else ():
                states[id(flat)][key][local].copy_(read(f"optim.{name}.{key}", piece.start, piece.numel))
        if step:
            for index, flat in flats.items():
                adopt_state(self._optimizer, flat, states[index], step)
        if self._remainder is not None:
            self._remainder.load(read, step)

    def _shard_gradients(self) -> list[Tensor]:
        return [g for group in self._zero.averaged_gradients.values() for g in group]

    def _pieces(self) -> Iterator[tuple[str, nn.Parameter, Any, Tensor, int]]:
        """Yields (name, parameter, piece of it that is here, flat partition, offset of the piece in that)."""
        for name, parameter in self._sharded:
            mapping = vars(parameter)["_hp_mapping"]  # DeepSpeed's; None where this rank holds nothing of it
            if mapping is not None:
                flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
                yield name, parameter, mapping.lp_fragment_address, flat, mapping.hp_fragment_address.start
