"""From a configuration to the sizes that decide on memory (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from sltrain_dist.config.rules import is_recomputed, keeps_attention, keeps_products, loss_chunk_tokens
from sltrain_dist.config.schema import Config, ModelConfig, ReparamConfig
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.block import Block, Recompute
from sltrain_dist.memory.device import Device
from sltrain_dist.memory.gradients import Parameter
from sltrain_dist.memory.head import Ends
from sltrain_dist.memory.operands import Linear, Widths
from sltrain_dist.models.count import block_linears
from sltrain_dist.sparse_lowrank.cost import choose_plan
from sltrain_dist.sparse_lowrank.layout import nonzeros, stored_index_bytes, values_per_row, values_shape

_MANY = 4096
"""Results that are remembered, for searches over thousands of configurations."""


@dataclass(frozen=True, eq=False)  # as Block
class Sizes:
    """A model and a micro-batch.

    Attributes:
        blocks: The different blocks: one, or two where some are computed again.
        order: Which of them each layer is, the first layer first.
        ends: What is before and after.
    """

    blocks: tuple[Block, ...]
    order: tuple[int, ...]
    ends: Ends

    @cached_property
    def block_parameters(self) -> tuple[Parameter, ...]:
        """Of one block, in the order of `named_parameters()`."""
        block = self.blocks[0]
        return (*(p for linear in block.linears for p in linear.parameters), block.norm, block.norm)

    @cached_property
    def end_parameters(self) -> tuple[Parameter, ...]:
        """Of embedding, last norm, and head if it has its own."""
        ends = self.ends
        return (ends.table, ends.gain) if ends.tied else (ends.table, ends.gain, ends.head)


def sizes(config: Config, device: Device, *, micro_batch: int | None = None) -> Sizes:
    """Of a run; `micro_batch` where it is not `train.micro_batch`."""
    train = config.train
    recompute = tuple(_recompute(config, i) for i in range(config.model.num_layers))
    kinds = tuple(dict.fromkeys(recompute))
    return _sizes(
        config.model,
        config.reparam,
        train.dtype,
        _gathered_width(config),
        micro_batch or train.micro_batch,
        config.data.seq_len,
        loss_chunk_tokens(config),
        kinds,
        tuple(kinds.index(kind) for kind in recompute),
        config.data.reset_attention,
        device,
    )


def _recompute(config: Config, index: int) -> Recompute:
    if not is_recomputed(index, config.train):
        return "nothing"
    if keeps_products(config.train):
        raise ConfigError(
            "the memory planner does not know train.checkpoint_policy=ops; plan with attention, which takes less, and "
            "with train.activation_checkpointing=none, which takes more"
        )
    return "all but attention" if keeps_attention(config.train) else "all"


def _gathered_width(config: Config) -> int:
    """Bytes of a block's sharded parameters as they are at hand: FSDP2 gathers them in bf16 under mixed precision."""
    return (
        2 if config.train.dtype == "bf16" or (config.train.dtype == "mixed" and config.parallel.engine == "fsdp") else 4
    )


@lru_cache(_MANY)
def _sizes(
    model: ModelConfig,
    reparam: ReparamConfig,
    dtype: str,
    gathered: int,
    micro_batch: int,
    length: int,
    chunk: int,
    kinds: tuple[Recompute, ...],
    order: tuple[int, ...],
    masked: bool,
    device: Device,
) -> Sizes:
    blocks = tuple(_block(model, reparam, dtype, gathered, micro_batch, length, kind, masked, device) for kind in kinds)
    tokens = micro_batch * length
    int8 = reparam.weight_bits == 8
    ends = _ends(model.vocab_size, model.hidden_size, model.tie_head, dtype, tokens, chunk, device, int8)
    return Sizes(blocks, order, ends)


@lru_cache(_MANY)
def _block(
    model: ModelConfig,
    reparam: ReparamConfig,
    dtype: str,
    gathered: int,
    micro_batch: int,
    length: int,
    kind: Recompute,
    masked: bool,
    device: Device,
) -> Block:
    whole, compute = _widths(dtype)
    widths = Widths(gathered, gathered, compute, whole)
    tokens = micro_batch * length
    linears = tuple(_linear(m.m, m.n, reparam, tokens, compute, device) for m in block_linears(model))
    gain = Parameter("dense", (model.hidden_size,), decays=False)
    return Block(micro_batch, length, model.num_heads, model.head_dim, linears, gain, widths, device, kind, masked)


@lru_cache(_MANY)
def _ends(
    vocabulary: int, hidden: int, tied: bool, dtype: str, tokens: int, chunk: int, device: Device, int8: bool
) -> Ends:
    whole, compute = _widths(dtype)
    return Ends(
        tokens, vocabulary, hidden, chunk, tied, Widths(whole, whole, compute, whole), device, int8 and not tied
    )


def _widths(dtype: str) -> tuple[int, int]:
    """Bytes of a parameter's value, and of one in matrix products."""
    return (2, 2) if dtype == "bf16" else (4, 4 if dtype == "fp32" else 2)


def _linear(m: int, n: int, reparam: ReparamConfig, tokens: int, compute: int, device: Device) -> Linear:
    r, support = reparam.rank, reparam.support
    plan = choose_plan(m, n, r, 0, support, tokens, bits=8 * compute, device=device.type)  # of no effect without S
    if reparam.method == "full":
        return Linear(m, n, 0, 0, support, 0, plan, m, (Parameter("dense", (m, n)),))
    int8 = reparam.weight_bits == 8
    factors = (Parameter("factors", (m, r), int8=int8), Parameter("factors", (r, n), int8=int8))
    if reparam.method == "lowrank":
        return Linear(m, n, r, 0, support, 0, plan, m, factors)
    nnz = nonzeros(m, n, reparam.density, support)
    plan = choose_plan(m, n, r, nnz, support, tokens, bits=8 * compute, device=device.type, path=reparam.path)
    rows = m
    if reparam.row_block_bytes is not None:  # as sparse_lowrank/functional.py: block_rows
        rows = max(1, min(m, reparam.row_block_bytes // (n * compute)))
    k = 0 if support == "random" else values_per_row(n, reparam.density, support)
    values = Parameter("sparse_values", values_shape(m, n, reparam.density, support), int8=int8)
    return Linear(m, n, r, nnz, support, k, plan, rows, (*factors, values))


@lru_cache(_MANY)
def index_bytes(model: ModelConfig, reparam: ReparamConfig) -> int:
    """Of all supports."""
    if reparam.method != "sltrain":
        return 0
    key = 8 if reparam.support == "stratified" else 0
    each = (key + stored_index_bytes(s.m, s.n, reparam.density, reparam.support) for s in block_linears(model))
    return model.num_layers * sum(each)
