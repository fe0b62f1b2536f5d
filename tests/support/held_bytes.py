"""What a rank holds, in closed form and independent of the planner, for comparisons with planner and engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sltrain_dist.config.schema import Config
from sltrain_dist.models.count import parameter_bytes
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.projected.settings import optimizer_settings
from sltrain_dist.optim.state_layout import MOMENTUM, STATE_NAMES, is_orthogonalized, state_bytes
from sltrain_dist.parallel.placement import (
    fsdp_range,
    optimizer_groups,
    sharded_and_whole,
    trained_parameters,
    zero3_values,
    zero12_gradients,
    zero12_partition,
)


@dataclass(frozen=True)
class RankBytes:
    """Bytes of tensors on one rank between the backward pass and the optimizer step.

    Attributes:
        parameters: Weights, shards, and DeepSpeed's separate partition of master weights.
        gradients: All gradients, without communication buckets. 0 with per-layer updates: their gradients are
            already freed.
        states: Optimizer states, from the end of the first update on.
    """

    parameters: int
    gradients: int
    states: int


def rank_bytes(config: Config, world_size: int, rank: int) -> RankBytes:
    """Computes the bytes on a rank in closed form, equal to those of the engine's tensors.

    Padding is included: FSDP2 pads a parameter's rows, ZeRO 1 and 2 pad each flat group to a multiple of twice the
    ranks, and ZeRO 3 pads every parameter to a multiple of the ranks.
    """
    parallel, optim = config.parallel, optimizer_settings(config)
    sharded, remainder = sharded_and_whole(config)
    width = config.train.precision.parameter_bytes
    trained = trained_parameters(remainder, config.reparam)
    states = sum(state_bytes(TensorRange.whole(name, shape), optim, width) for name, shape in trained)
    parts: tuple[int, ...] = (0, 0, 0)
    if parallel.engine == "fsdp":
        ranks = world_size // parallel.replicas
        ranges = [fsdp_range(name, shape, rank % ranks, ranks) for name, shape in sharded]
        padded = sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for _, shape in sharded)
        parts = (padded, padded, 0)
        states += sum(state_bytes(part, optim, width) for part in ranges)
    elif parallel.engine == "zero":
        if parallel.zero_stage == 3:
            parts = zero3_values(sharded, world_size, offload=parallel.cpu_offload)
        else:
            per_group = [
                _zero12_values(group, world_size, rank, parallel.cpu_offload)
                for group in optimizer_groups(sharded, optim)
            ]
            parts = tuple(sum(values) for values in zip(*per_group, strict=True))
        states += width * _zero_state_values(config, world_size, rank)
    trained_values = sum(math.prod(shape) for _, shape in trained)
    whole_bytes = sum(parameter_bytes(name, shape, config.reparam, width) for name, shape in remainder)
    gradients = 0 if optim.update == "per_layer" else width * (parts[1] + trained_values)
    return RankBytes(width * parts[0] + whole_bytes, gradients, states)


def _zero_state_values(config: Config, ranks: int, rank: int) -> int:
    """Values of optimizer states of sharded parameters: of Adam for whole partitions, of matrices without padding."""
    optim, sharded = config.optim, sharded_and_whole(config)[0]
    others = tuple((name, shape) for name, shape in sharded if not is_orthogonalized(name, optim))
    matrices = [shape for name, shape in sharded if is_orthogonalized(name, optim)]
    per_value = len(STATE_NAMES[optim.name]), len([MOMENTUM])
    if config.parallel.zero_stage == 3:
        sizes = [(math.prod(shape), -(-math.prod(shape) // ranks)) for shape in matrices]
        mine = sum(max(0, min(each, size - rank * each)) for size, each in sizes)
        return per_value[0] * zero3_values(others, ranks, offload=False)[2] + per_value[1] * mine
    total, each = zero12_partition(matrices, ranks)
    mine = max(0, min(each, total - rank * each))
    parts = sum(zero12_partition(group, ranks)[1] for group in optimizer_groups(others, optim))
    return per_value[0] * parts + per_value[1] * mine


def _zero12_values(shapes: Sequence[tuple[int, ...]], ranks: int, rank: int, offload: bool) -> tuple[int, ...]:
    _, part = zero12_partition(shapes, ranks)
    return ranks * part + part, part if offload else zero12_gradients(shapes, ranks)[rank], part
