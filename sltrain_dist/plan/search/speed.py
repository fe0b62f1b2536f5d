"""Predicted time of an update, for ranking configurations (no torch).

It is based on the cost model that chooses the routes of layers (:mod:`sltrain_dist.sparse_lowrank.cost`, "cuda"): large
matrix products run at one rate, and everything else at the memory's bandwidth. The constants are those of one GPU, an
H200. Ratios between configurations are therefore meaningful, seconds are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config, ModelConfig, ReparamConfig
from sltrain_dist.models.count import block_linears, count_parameters
from sltrain_dist.sparse_lowrank.cost import RATES, ROUTES, LayerShape, Route, choose_route, route_costs

MEMORY_BANDWIDTH = 4.1e12
"""Bytes per second that the device's memory reads and writes (an H200: 4.0e12 to 4.2e12 in copies)."""

LINK_BANDWIDTH = 50e9
"""Bytes per second that a rank sends (one 400 Gb/s port per rank; NVLink within a host is several times as fast)."""

HOST_BANDWIDTH = 20e9
"""Bytes per second between device and host (PCIe 4.0 ×16: 32e9 on paper)."""

LAUNCH_S = 5e-6
"""Seconds to launch a kernel. A decoder layer takes at least as long as the launches of its kernels."""

KERNELS_PER_LAYER = 150
"""Number of kernels that a decoder layer's forward and backward pass launch."""

LAYER_COPIES = (10, 4)
"""Elements per token that a decoder layer's norms, rotation, activation and sums read and write in the forward pass, in
multiples of the hidden and of the intermediate size. The backward pass reads and writes twice as many."""

LOW_BIT_VALUE_BYTES = 3000
"""Cost of an optimizer step whose states are quantized or of another type than the parameters, as equivalent memory
traffic in bytes per value: 0.72 ns per value of a 7B model on an H200 (docs/reports/2026-11-27-h200.md). Such a step
consists of dozens of small operators (optim/low_bit.py). Any other step reads and writes each tensor once."""


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of one update on each rank.

    Attributes:
        compute: Forward and backward passes of all micro-batches.
        optimizer: Optimizer step.
        communication: Communication that does not overlap with compute.
    """

    compute: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds of the whole update."""
        return self.compute + self.optimizer + self.communication


def update_time(config: Config, ranks: int, comm_bytes: float) -> UpdateTime:
    """Predicts the time of an update in which each rank sends `comm_bytes` bytes."""
    passes = micro_batches_per_update(config, ranks)
    compute = passes * _pass_seconds(config)
    if config.optim.passes_twice:
        compute *= 2
    sent = comm_bytes / LINK_BANDWIDTH
    # Unsharded gradients are sent in the last micro-batch's backward pass, sharded ones in every pass.
    overlap = compute / passes * 2 / 3 if config.parallel.accumulates_locally else compute
    return UpdateTime(compute, _step_seconds(config, ranks), max(0.0, sent - overlap))


def _pass_seconds(config: Config) -> float:
    """Returns the seconds of a micro-batch's forward and backward pass."""
    model, train = config.model, config.train
    tokens, bits = train.micro_batch * config.data.seq_len, _bits(config)
    rates = RATES["cuda", bits]
    unit = 2 * bits / 8 / rates.copy / MEMORY_BANDWIDTH  # seconds of a multiply-add, of which a copy takes `copy`
    replaced, dense = (
        sum(cost for _, cost in _linear_costs(model, reparam, tokens, bits))
        for reparam in (config.reparam, config.reparam.model_copy(update={"method": "full"}))
    )
    # Multiply-adds of the forward pass: scores and weighted values, each for half of all token pairs. A fused kernel
    # takes 2.5 times as many in the backward pass: it recomputes the scores (FlashAttention-2, arXiv 2307.08691).
    attention = tokens * config.data.seq_len * model.hidden_size
    per_hidden, per_intermediate = LAYER_COPIES
    copies = rates.copy * tokens * (per_hidden * model.hidden_size + per_intermediate * model.intermediate_size)
    total = 3 * tokens * model.vocab_size * model.hidden_size * unit
    for index in range(model.num_layers):
        linears = dense if config.reparam.method_of(index, model.num_layers) == "full" else replaced
        cost, launches = linears + 3.5 * attention + 3 * copies, 1.0
        if train.is_recomputed(index):  # another forward pass, a third of both passes
            cost += copies
            cost += 0 if train.keeps_products else linears / 3
            cost += 0 if train.keeps_attention else attention
            launches += 1 / 3
        total += max(cost * unit, launches * KERNELS_PER_LAYER * LAUNCH_S)
    return total


def layer_routes(config: Config) -> tuple[Route | None, ...]:
    """Returns the route of each linear layer of a decoder layer on a GPU; None if the method has no routes."""
    tokens = config.train.micro_batch * config.data.seq_len
    return tuple(route for route, _ in _linear_costs(config.model, config.reparam, tokens, _bits(config)))


def _bits(config: Config) -> int:
    return 8 * config.train.precision.product_bytes


@lru_cache(maxsize=4096)
def _linear_costs(
    model: ModelConfig, reparam: ReparamConfig, tokens: int, bits: int
) -> tuple[tuple[Route | None, float], ...]:
    """Returns route and cost of a decoder layer's linear layers: multiply-adds of a large product, for both passes."""
    costs: list[tuple[Route | None, float]] = []
    for linear in block_linears(model):
        m, n, r = linear.m, linear.n, reparam.rank
        if reparam.method == "full":
            costs.append((None, 3 * tokens * m * n))
        elif reparam.method == "lowrank":
            costs.append((None, 3 * tokens * r * (m + n)))
        else:
            shape = LayerShape.of(m, n, reparam)
            route = choose_route(shape, tokens, bits=bits, device="cuda", path=reparam.path)
            costs.append((route, route_costs(shape, tokens, bits=bits, device="cuda")[ROUTES.index(route)]))
    return tuple(costs)


def _step_seconds(config: Config, ranks: int) -> float:
    """Returns the seconds of the optimizer step on a rank's share of the parameters."""
    optim, parallel, width = config.optim, config.parallel, config.train.precision.parameter_bytes
    counted = count_parameters(config.model, config.reparam)
    whole = counted.remainder if parallel.shard == "factors" else 0
    shards = 1 if parallel.engine == "ddp" else ranks // parallel.replicas
    values = whole + (counted.total - whole) / shards
    if optim.state_bits in (8, 4) or optim.master_weights or (optim.state_bits == 32 and width == 2):
        per_value = LOW_BIT_VALUE_BYTES
    else:
        per_value = 7 * width  # the gradient read, the parameter and two states read and written
    seconds = values * per_value / MEMORY_BANDWIDTH
    if parallel.cpu_offload:  # copies gradients to the host and parameters back; the host's memory limits the step
        seconds += values * 2 * width / HOST_BANDWIDTH + values * per_value / HOST_BANDWIDTH
    return seconds
