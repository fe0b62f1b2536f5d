"""Predicted time of an update, for ranking configurations (no torch).

It is the roofline that chooses the routes of layers (:mod:`sltrain_dist.sparse_lowrank.cost`), for one GPU. A kernel
takes the larger of the times of its arithmetic and of its memory traffic, and the time of its launch. Ratios between
configurations are meaningful, seconds are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config, ModelConfig, ReparamConfig
from sltrain_dist.models.count import block_linears, count_parameters, parameter_shapes
from sltrain_dist.optim.state_layout import is_orthogonalized
from sltrain_dist.sparse_lowrank.cost import ROUTES, Route, choose_route, kernel_seconds, route_seconds
from sltrain_dist.sparse_lowrank.devices import ROUTE_GPU
from sltrain_dist.sparse_lowrank.route_kernels import Kernel, LayerShape, dense_kernels, low_rank_kernels

DEVICE = ROUTE_GPU
"""The GPU that times are predicted for."""

LINK_BANDWIDTH = 50e9
"""Bytes per second that a rank sends (one 400 Gb/s port per rank; NVLink within a host is several times as fast)."""

HOST_BANDWIDTH = 20e9
"""Bytes per second between device and host (PCIe 4.0 ×16: 32e9 on paper)."""

OTHER_KERNELS = 43
"""Number of kernels that a decoder layer's forward pass launches besides its linear layers. The backward pass launches
twice as many."""

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
    model, train, tokens, bits = config.model, config.train, _tokens(config), _bits(config)
    replaced, dense = (
        sum(seconds for _, seconds in _linear_seconds(model, reparam, tokens, bits))
        for reparam in (config.reparam, config.reparam.model_copy(update={"method": "full"}))
    )
    attention, others = (kernel_seconds([kernel], bits, DEVICE) for kernel in _forward_kernels(config))
    total = kernel_seconds(dense_kernels(model.vocab_size, model.hidden_size, tokens, bits, DEVICE), bits, DEVICE)
    for index in range(model.num_layers):
        linears = dense if config.reparam.method_of(index, model.num_layers) == "full" else replaced
        # A fused kernel takes 2.5 times as long in the backward pass: it recomputes the scores (FlashAttention-2, arXiv
        # 2307.08691).
        total += linears + 3.5 * attention + 3 * others
        if train.is_recomputed(index):  # another forward pass, a third of both passes
            total += others
            total += 0 if train.keeps_products else linears / 3
            total += 0 if train.keeps_attention else attention
    return total


def _forward_kernels(config: Config) -> tuple[Kernel, Kernel]:
    """Returns the kernel of attention in a decoder layer's forward pass, and all others besides its linear layers."""
    model, tokens, width = config.model, _tokens(config), _bits(config) // 8
    per_hidden, per_intermediate = LAYER_COPIES
    elements = tokens * (per_hidden * model.hidden_size + per_intermediate * model.intermediate_size)
    # Scores and weighted values, each for half of all pairs of tokens; queries, keys, values and outputs are moved.
    flops, moved = 2 * tokens * config.data.seq_len * model.hidden_size, 4 * width * tokens * model.hidden_size
    return Kernel("attention", "matrix", flops, moved), Kernel("others", "copy", 0, 2 * width * elements, OTHER_KERNELS)


def layer_routes(config: Config) -> tuple[Route | None, ...]:
    """Returns the route of each linear layer of a decoder layer on a GPU; None if the method has no routes."""
    return tuple(route for route, _ in _linear_seconds(config.model, config.reparam, _tokens(config), _bits(config)))


def _tokens(config: Config) -> int:
    return config.train.micro_batch * config.data.seq_len


def _bits(config: Config) -> int:
    return 8 * config.train.precision.product_bytes


@lru_cache(maxsize=4096)
def _linear_seconds(
    model: ModelConfig, reparam: ReparamConfig, tokens: int, bits: int
) -> tuple[tuple[Route | None, float], ...]:
    """Returns route and seconds, for both passes, of each linear layer of a decoder layer."""
    found: list[tuple[Route | None, float]] = []
    for linear in block_linears(model):
        m, n = linear.m, linear.n
        if reparam.method == "sltrain":
            shape = LayerShape.of(m, n, reparam, linear.sharing)
            route = choose_route(shape, tokens, bits=bits, device=DEVICE, path=reparam.path)
            seconds = route_seconds(shape, tokens, bits=bits, device=DEVICE)[ROUTES.index(route)]
            found.append((route, seconds))
            continue
        if reparam.method in ("lowrank", "cola"):
            kernels = low_rank_kernels(m, n, reparam.rank, tokens, bits, DEVICE)
        elif reparam.method == "relora":  # the frozen weight has no gradient
            dense = [kernel for kernel in dense_kernels(m, n, tokens, bits, DEVICE) if kernel.name != "gᵀx"]
            kernels = [*dense, *low_rank_kernels(m, n, reparam.rank, tokens, bits, DEVICE)]
        else:
            kernels = dense_kernels(m, n, tokens, bits, DEVICE)
        found.append((None, kernel_seconds(kernels, bits, DEVICE)))
    return tuple(found)


def _step_seconds(config: Config, ranks: int) -> float:
    """Returns the seconds of the optimizer step on a rank's share of the parameters."""
    optim, parallel, width = config.optim, config.parallel, config.train.precision.parameter_bytes
    counted = count_parameters(config.model, config.reparam)
    whole = counted.remainder if parallel.shard == "factors" else 0
    shards = 1 if parallel.engine == "ddp" else ranks // parallel.replicas
    trained = counted.total - (counted.dense if config.reparam.method == "relora" else 0)
    values = whole + (trained - whole) / shards
    orthogonalizing = _orthogonalizing_seconds(config) / ranks
    if optim.state_bits in (8, 4) or optim.master_weights or (optim.state_bits == 32 and width == 2):
        per_value = LOW_BIT_VALUE_BYTES
    else:
        per_value = 7 * width  # the gradient read, the parameter and two states read and written
    seconds = values * per_value / DEVICE.rate("copy", 16).bandwidth
    if parallel.cpu_offload:  # copies gradients to the host and parameters back; the host's memory limits the step
        seconds += values * 2 * width / HOST_BANDWIDTH + values * per_value / HOST_BANDWIDTH
    return seconds + orthogonalizing


def _orthogonalizing_seconds(config: Config) -> float:
    """Returns the seconds in which one rank would orthogonalize all matrices of `optim.factors`.

    Each of five iterations multiplies an (a, b) matrix, a ≤ b, twice by its a × a Gram matrix, and squares that.
    """
    optim, seconds = config.optim, 0.0
    if optim.factors == "adam":
        return 0.0
    bits = 16 if optim.newton_schulz == "bf16" else 32
    for name, shape in parameter_shapes(config.model, config.reparam):
        if is_orthogonalized(name, optim):
            a, b = min(shape), max(shape)
            kernel = Kernel("matrix", "matrix", 2 * (2 * a * a * b + a**3), bits // 8 * 4 * (a * b + a * a), 3)
            seconds += 5 * kernel_seconds([kernel], bits, DEVICE)
    return seconds
