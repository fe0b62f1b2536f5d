"""What DeepSpeed is told at the start of ZeRO, and a memory-efficient start: a meta model is allocated with only the
memory that its stage keeps.

By default DeepSpeed shards a whole model. In stages 1 and 2 it copies the parameters into flat buffers, so that they
exist twice for a time; in stage 3 every rank allocates all of them first.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sltrain_dist.config.load import merged
from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config, OptimConfig
from sltrain_dist.models.build import give_memory, materialise
from sltrain_dist.models.llama import DecoderLayer, LlamaForCausalLM
from sltrain_dist.optim.factory import parameter_groups
from sltrain_dist.parallel.placement import ZERO_BUCKET, zero12_partition
from sltrain_dist.runtime.environment import Environment


def deepspeed_config(config: Config, world_size: int, sharded_numel: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, derived from ours, with all relevant settings made explicit.

    Args:
        config: The configuration. The keys of `parallel.deepspeed` are merged last; config/rules.py has refused those
            that are derived from other settings.
        world_size: Number of ranks.
        sharded_numel: Number of values in the parameters that DeepSpeed manages.
    """
    train, parallel = config.train, config.parallel
    bucket = min(ZERO_BUCKET, sharded_numel)
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": False,
        # In values. The default of 5e8 would allocate 1 GB in bf16 even for the smallest model.
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,  # must be even
    }
    if parallel.zero_stage == 3:
        layer = -(-sharded_numel // config.model.num_layers)
        zero |= {
            # The default keeps a billion gathered parameters, which would leave all presets but 7B unsharded.
            "stage3_max_live_parameters": (1 + parallel.prefetch_blocks) * layer,
            "stage3_prefetch_bucket_size": parallel.prefetch_blocks * layer,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,  # shard small parameters too
        }
    elif not parallel.cpu_offload:  # offload requires DeepSpeed's norm
        zero["compute_grad_norm"] = False  # it would leave out the remainder; we compute the norm before the step
    if parallel.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    values: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": micro_batches_per_update(config, world_size),
        "gradient_allreduce_op": "mean" if parallel.zero_stage == 3 else "sum",  # stage 3 does not support sums
        "gradient_clipping": 0.0,  # we clip over all parameters; DeepSpeed 0.19 clips at 1.0 by default
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
    if train.precision.parameter == "bfloat16":
        values["bf16"] = {
            "enabled": True,
            # Pure bf16, as with the other engines: no fp32 master weights, states in bf16.
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
            "check_grad_overflow": False,  # the training loop checks the norm before the update
        }
        values["data_types"] = {"grad_accum_dtype": "bf16"}
    return merged(values, parallel.deepspeed)


class FlatGroup(NamedTuple):
    """A parameter group of the optimizer whose parameters are consecutive views of one flat tensor."""

    parameters: list[nn.Parameter]
    flat: Tensor


def partition_by_layer(
    deepspeed: Any, model: LlamaForCausalLM, sharded: Collection[str], settings: dict[str, Any], device: torch.device
) -> list[tuple[str, nn.Parameter]]:
    """Partitions the decoder layers for stage 3 one after another, so that only one is whole at a time.

    Args:
        deepspeed: The library.
        model: The model. Parameters that are not sharded are removed from its modules' registries.
        sharded: Names of the parameters to shard.
        settings: DeepSpeed's configuration.
        device: Device of the parameters.

    Returns:
        All parameters by name.
    """
    empty = partial(torch.empty_like, device=device)
    later = {parameter for name, parameter in model.named_parameters() if name in sharded}
    materialise(model, lambda tensor: tensor if tensor in later else empty(tensor))
    remainder = [(name, parameter) for name, parameter in model.named_parameters() if name not in sharded]
    # Stage 3 partitions all parameters that are registered in a module, not only those that it optimizes.
    _unregister(model, (parameter for _, parameter in remainder))
    # Linear layers that share an input are applied without being called, so that hooks on them would not run.
    deepspeed.utils.set_z3_leaf_modules(model, [DecoderLayer])
    for layer in model.model.layers:
        give_memory(layer, empty)
        deepspeed.zero.Init(module=layer, config_dict_or_path=settings)
    materialise(model, empty)  # the rest, whose sharded parameters deepspeed.initialize() partitions
    return [*model.named_parameters(), *remainder]


def give_flat_memory(
    model: LlamaForCausalLM, sharded: Collection[str], optim: OptimConfig, env: Environment
) -> list[FlatGroup]:
    """Allocates a meta model for stages 1 and 2, with each of the optimizer's groups in one flat tensor.

    Returns:
        The groups; an empty list if the model is already allocated, with separate parameters.
    """

    def groups() -> list[list[nn.Parameter]]:
        named = [(name, parameter) for name, parameter in model.named_parameters() if name in sharded]
        return [group["params"] for group in parameter_groups(named, optim)]

    flats: list[Tensor] = []
    views: dict[Tensor, Tensor] = {}
    for group in groups():
        if not group[0].is_meta:
            return []
        total, part = zero12_partition([tuple(parameter.shape) for parameter in group], env.world_size)
        flat = torch.empty(env.world_size * part, dtype=group[0].dtype, device=env.device)
        flat[total:].zero_()
        pieces = flat[:total].split([parameter.numel() for parameter in group])
        views.update({meta: piece.view(meta.shape) for meta, piece in zip(group, pieces, strict=True)})
        flats.append(flat)
    materialise(model, lambda tensor: views[tensor] if tensor in views else torch.empty_like(tensor, device=env.device))
    return [FlatGroup(group, flat) for group, flat in zip(groups(), flats, strict=True)]


@contextmanager
def use_flat_memory(deepspeed: Any, groups: list[FlatGroup]) -> Iterator[None]:
    """Makes stages 1 and 2 use the memory of these groups as their flat buffers.

    DeepSpeed would copy each group into a new flat buffer, so that the model exists twice until all groups are
    copied. It still does if `parallel.deepspeed` requires an order or a padding that the groups do not have.
    """
    stage_1_and_2 = deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer
    copy = stage_1_and_2.flatten_dense_tensors_aligned

    def flatten(
        optimizer: Any,
        parameters: list[nn.Parameter],
        alignment: int,
        use_cpu_data: bool = False,
        param_padding: list[int] | None = None,
    ) -> Tensor:
        for group in groups if not any(param_padding or ()) else ():
            if list(map(id, parameters)) == list(map(id, group.parameters)) and group.flat.numel() % alignment == 0:
                return group.flat
        if groups:
            warnings.warn(
                "DeepSpeed copies the model at the start, which briefly takes twice its memory, because it needs "
                "another order or padding of parameters (due to parallel.deepspeed, or to the version of DeepSpeed)",
                RuntimeWarning,
                stacklevel=2,
            )
        return copy(optimizer, parameters, alignment, use_cpu_data=use_cpu_data, param_padding=param_padding)

    stage_1_and_2.flatten_dense_tensors_aligned = flatten
    try:
        yield
    finally:
        stage_1_and_2.flatten_dense_tensors_aligned = copy


def _unregister(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Makes parameters plain attributes of their modules, which use them but do not list them."""
    ids = {id(parameter) for parameter in parameters}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in ids:
                del module._parameters[name]
                module.__dict__[name] = parameter
