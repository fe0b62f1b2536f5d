"""Placement of parameters on ranks: which are sharded, and how (no torch)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from sltrain_dist.config.schema import Config, ModelConfig, OptimConfig, ReparamConfig
from sltrain_dist.models.count import is_factor, is_frozen, parameter_shapes
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.state_layout import GROUP_KINDS, decays, is_orthogonalized, shared_groups

Shard = Literal["factors", "all"]
"""Which parameters an engine shards; see `parallel.shard`."""
Named = tuple[tuple[str, tuple[int, ...]], ...]
"""(name, shape) of parameters. A tuple, because it is a key of caches that the planner reads often."""
_CACHE_SIZE = 256
"""Number of models in a cache."""

ZERO_BUCKET = 50_000_000
"""Default of DeepSpeed's bucket size, in values; `parallel.deepspeed` can override it."""


def is_sharded(name: str, shard: Shard) -> bool:
    """Whether an engine that shards parameters shards this one."""
    return shard == "all" or is_factor(name)


def sharded_and_whole(config: Config) -> tuple[Named, Named]:
    """Returns (sharded parameters, replicated parameters) of a configuration."""
    return _sharded_and_whole(config.model, config.reparam, config.parallel.engine != "ddp", config.parallel.shard)


@lru_cache(maxsize=_CACHE_SIZE)
def _sharded_and_whole(model: ModelConfig, reparam: ReparamConfig, shards: bool, shard: Shard) -> tuple[Named, Named]:
    shapes = parameter_shapes(model, reparam)
    sharded = tuple((name, shape) for name, shape in shapes if shards and is_sharded(name, shard))
    sharded_names = {name for name, _ in sharded}
    return sharded, tuple((name, shape) for name, shape in shapes if name not in sharded_names)


def trained_parameters(parameters: Named, reparam: ReparamConfig) -> Named:
    """Returns those parameters that have gradients."""
    return tuple((name, shape) for name, shape in parameters if not is_frozen(name, reparam))


def optimizer_groups(parameters: Named, optim: OptimConfig) -> list[tuple[tuple[int, ...], ...]]:
    """Returns the shapes in each non-empty parameter group, which ZeRO 1 and 2 flatten separately."""
    if optim.weight_decay == 0 and optim.factors == "adam":
        return [tuple(shape for _, shape in parameters)] if parameters else []
    kinds = [(is_orthogonalized(name, optim), decays(name, optim)) for name, _ in parameters]
    groups = [
        tuple(shape for (_, shape), kind in zip(parameters, kinds, strict=True) if kind == group)
        for group in GROUP_KINDS
    ]
    return [group for group in groups if group]


def fsdp_rows(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Returns (first, last + 1) of a rank's rows under FSDP2: ⌈rows/ranks⌉ per rank, and fewer on the last ranks."""
    each = -(-rows // ranks)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def vector_borders(shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Returns the offsets of a vector's non-empty shards under FSDP2, except the first; () for matrices."""
    if len(shape) > 1:
        return ()
    return tuple(
        first for first, last in (fsdp_rows(shape[0], rank, ranks) for rank in range(1, ranks)) if first < last
    )


def fsdp_range(name: str, shape: tuple[int, ...], rank: int, ranks: int) -> TensorRange:
    """Returns the range that is a rank's shard of a parameter under FSDP2."""
    row = math.prod(shape[1:])
    first, last = fsdp_rows(shape[0], rank, ranks)
    return TensorRange(name, shape, first * row, (last - first) * row, vector_borders(shape, ranks))


def scale_sync_bytes(config: Config, world_size: int) -> int:
    """Bytes of the all-reduce of the scales of quantization groups that ranks share; two scales per group."""
    if config.parallel.engine != "fsdp":
        return 0
    ranks = world_size // config.parallel.replicas
    vectors = Counter(
        shape for _, shape in sharded_and_whole(config)[0] if len(shape) == 1
    )  # matrices have no shared groups
    shared = {shape: shared_groups(fsdp_range("", shape, 0, ranks), config.optim.state_bits) for shape in vectors}
    return 8 * sum(count * len(shared[shape]) for shape, count in vectors.items())


def accumulated_gradient_bytes(config: Config, world_size: int) -> int:
    """Bytes of the gradients on a rank between two micro-batches of an update, with ddp or fsdp."""
    sharded, remainder = sharded_and_whole(config)
    ranks = 1 if config.parallel.accumulates_locally else world_size // config.parallel.replicas
    values = sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for _, shape in sharded)
    trained = trained_parameters(remainder, config.reparam)
    return config.train.precision.parameter_bytes * (values + sum(math.prod(shape) for _, shape in trained))


@lru_cache(maxsize=_CACHE_SIZE)
def zero3_values(sharded: Named, ranks: int, *, offload: bool) -> tuple[int, ...]:
    """Returns the numbers of values (parameters, gradients, states) on a rank under ZeRO 3."""
    part = sum(-(-math.prod(shape) // ranks) for _, shape in sharded)
    # Shards, and a copy of them that the optimizer updates; with offload the gradients are copied too.
    return 2 * part, (2 if offload else 1) * part, part


@lru_cache(maxsize=_CACHE_SIZE)
def zero12_gradients(shapes: Sequence[tuple[int, ...]], ranks: int) -> tuple[int, ...]:
    """Returns the number of gradient values of a group that each rank keeps under ZeRO 1 and 2, without offload.

    A gradient that spans several partitions is kept whole by each of their ranks, and padding is kept as zeros.
    """
    total, part = zero12_partition(shapes, ranks)
    kept = [max(0, (rank + 1) * part - max(rank * part, total)) for rank in range(ranks)]
    start = 0
    for shape in shapes:
        size = math.prod(shape)
        for rank in range(start // part, -(-(start + size) // part)):
            kept[rank] += size
        start += size
    return tuple(kept)


def zero12_partition(shapes: Sequence[tuple[int, ...]], ranks: int) -> tuple[int, int]:
    """Returns (values in a group, values in each rank's partition with padding)."""
    total = sum(math.prod(shape) for shape in shapes)
    return total, 2 * -(-total // (2 * ranks))
