"""Communication volume of an update in closed form, from the sharding rules (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.models.count import parameter_shapes
from sltrain_dist.optim.state_layout import is_orthogonalized
from sltrain_dist.parallel.placement import (
    Named,
    optimizer_groups,
    scale_sync_bytes,
    sharded_and_whole,
    trained_parameters,
    zero3_values,
    zero12_partition,
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one update, by kind of collective.

    Counted for ring algorithms, which send the minimum: for a message of X bytes among N ranks, a rank sends
    (N − 1)/N·X in an all-gather or a reduce-scatter, and twice that in an all-reduce.
    """

    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_reduce: float = 0.0
    other: float = 0.0

    @staticmethod
    def of(kind: str, message_bytes: float, ranks: int) -> Traffic:
        """Returns the traffic of one collective with a message of `message_bytes`, counted before sharding."""
        sent = message_bytes * (ranks - 1) / ranks
        return Traffic(**{kind: 2 * sent if kind == "all_reduce" else sent})

    @property
    def total(self) -> float:
        """Bytes over all kinds of collectives."""
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.other

    def __add__(self, more: Traffic) -> Traffic:
        return Traffic(
            self.all_gather + more.all_gather,
            self.reduce_scatter + more.reduce_scatter,
            self.all_reduce + more.all_reduce,
            self.other + more.other,
        )


def update_traffic(config: Config, world_size: int) -> Traffic:
    """Computes what a rank sends in one update, without the few scalars for counts, losses and norms.

    DeepSpeed's stages 1 and 2 all-reduce whole gradients, of which each rank then keeps its partition. Stage 3
    gathers every decoder layer for the forward and for the backward pass, but skips layers that are still gathered.
    Its result is therefore an upper bound; for a model with a single layer, the minimum is about half of it.
    """
    parallel, width = config.parallel, config.train.precision.parameter_bytes
    passes = micro_batches_per_update(config, world_size)
    reductions = 1 if parallel.accumulates_locally else passes
    sharded, whole = sharded_and_whole(config)
    trained = trained_parameters(whole, config.reparam)
    sent = Traffic.of("all_reduce", width * sum(_padded_values(trained, 1)), world_size)
    if parallel.engine == "fsdp":
        sent += _fsdp_traffic(sharded, config, world_size, passes, reductions)
    if config.optim.passes_twice:
        sent += sent
    sent += _whole_matrix_traffic(config, world_size)
    if parallel.engine == "fsdp":
        return sent + Traffic.of("all_reduce", scale_sync_bytes(config, world_size), world_size)
    if parallel.engine == "zero" and parallel.zero_stage == 3:
        padded = width * world_size * zero3_values(sharded, world_size, offload=False)[2]
        gathers = Traffic.of("all_gather", 2 * passes * padded, world_size)
        return sent + gathers + Traffic.of("reduce_scatter", passes * padded, world_size)
    if parallel.engine == "zero":
        for group in optimizer_groups(sharded, config.optim):
            values, part = zero12_partition(group, world_size)
            sent += Traffic.of("all_reduce", reductions * width * values, world_size)
            sent += Traffic.of("all_gather", width * world_size * part, world_size)
    return sent


def _fsdp_traffic(sharded: Named, config: Config, world_size: int, passes: int, reductions: int) -> Traffic:
    parallel, width = config.parallel, config.train.precision.parameter_bytes
    ranks = world_size // parallel.replicas
    layers, root = _padded_values(sharded, ranks)
    gathers = passes * (2 if parallel.reshard_after_forward else 1)
    gathered_width = config.train.precision.product_bytes
    # The root module keeps its own parameters gathered from the forward to the backward pass.
    gathered = gathers * gathered_width * layers + passes * width * root
    reduced = reductions * width * (layers + root)
    sent = Traffic.of("all_gather", gathered, ranks) + Traffic.of("reduce_scatter", reduced, ranks)
    return sent + Traffic.of("all_reduce", reduced / ranks, parallel.replicas)


def _whole_matrix_traffic(config: Config, world_size: int) -> Traffic:
    """Returns what the optimizer of `optim.factors` sends, in float32 (parallel/whole_layers.py: deal).

    The ranks send what they hold of the averaged gradients to the rank that orthogonalizes them, with spectron also of
    B and A, and get the results. Under ddp, each rank has all values.
    """
    optim, parallel = config.optim, config.parallel
    if optim.factors == "adam":
        return Traffic()
    copies = world_size if parallel.engine == "ddp" else parallel.replicas
    values = sum(
        math.prod(shape)
        for name, shape in parameter_shapes(config.model, config.reparam)
        if is_orthogonalized(name, optim)
    )
    collected = values * (2 if optim.factors == "spectron" else 1) if world_size > copies else 0
    return Traffic.of("other", 4 * (collected + values), world_size)


@lru_cache(maxsize=256)
def _padded_values(sharded: Named, ranks: int) -> tuple[int, int]:
    """Returns the numbers of values inside and outside of the decoder layers, with rows padded to the ranks."""
    layers = root = 0
    for name, shape in sharded:
        padded = -(-shape[0] // ranks) * ranks * math.prod(shape[1:])
        if ".layers." in name:
            layers += padded
        else:
            root += padded
    return layers, root
