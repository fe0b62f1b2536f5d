"""Memory-efficient start of ZeRO: a meta model is allocated with only the memory that its stage keeps.

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

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.models.build import give_memory, materialise
from sltrain_dist.models.llama import DecoderLayer, LlamaForCausalLM
from sltrain_dist.optim.factory import parameter_groups
from sltrain_dist.parallel.placement import zero12_partition
from sltrain_dist.runtime.environment import Environment


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
