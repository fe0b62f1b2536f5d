"""The configurations that tools/gpu_runs.py trains (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Values = dict[str, Any]
"""A configuration by dotted key, and `preset`."""

SMALL: Values = {"preset": "llama_60m", "model.num_layers": 4, "train.micro_batch": 8, "train.global_batch": 16}
PATHS = [
    {"reparam.support": support, "reparam.path": path}
    for support in ("random", "stratified", "blocks")
    for path in ("materialize", "factored")
]
PLAIN = [{"reparam.method": "full"}, {"reparam.method": "lowrank"}]
BLOCKS: Values = {"reparam.support": "blocks", "reparam.path": "factored"}
RANDOM: Values = {"reparam.support": "random", "reparam.path": "materialize"}
DTYPES = ("bf16", "fp32", "mixed")
LOW_MEMORY: Values = {
    "optim.state_bits": 8,
    "optim.update": "per_layer",
    "train.activation_checkpointing": "full",
    "train.global_batch": 8,
    "train.micro_batch": 8,
}


def engines() -> Iterator[Values]:
    """Yields every engine, in the data types of which it holds parameters and products differently."""
    for dtype in ("bf16", "mixed"):
        yield {**BLOCKS, "train.dtype": dtype, "parallel.engine": "ddp"}
        yield {**BLOCKS, "train.dtype": dtype, "parallel.engine": "fsdp"}
        for stage in (1, 2, 3):
            yield {**BLOCKS, "train.dtype": dtype, "parallel.engine": "zero", "parallel.zero_stage": stage}


def ddp() -> Iterator[Values]:
    """Yields configurations for one process without a process group."""
    for dtype in DTYPES:
        for weights in (*PATHS, *PLAIN):
            yield {**weights, "train.dtype": dtype}
    for weights in (RANDOM, BLOCKS):
        for bits in (32, 8, 4):
            yield {**weights, "optim.state_bits": bits}
        for bits in (16, 8, 4):
            yield {**weights, "optim.state_bits": bits, "optim.update": "per_layer"}
        yield {**weights, **LOW_MEMORY}
        yield {**weights, **LOW_MEMORY, "reparam.weight_bits": 8}
        yield {**weights, "train.activation_checkpointing": "full"}
        yield {**weights, "train.activation_checkpointing": "selective", "train.checkpoint_policy": "attention"}
        yield {**weights, "train.loss_chunk_tokens": 0}
        yield {**weights, "data.batching": "pack", "data.reset_attention": True}
        yield {**weights, "model.num_kv_heads": 2}
        yield {**weights, "model.tie_head": True}
        yield {**weights, "optim.clip": 0.5}
        yield {**weights, "optim.stochastic_rounding": True}
        yield {**weights, "optim.master_weights": True, "optim.state_bits": 32}
        yield {**weights, "data.seq_len": 1024}
    yield {**RANDOM, "reparam.row_block_bytes": 1 << 18}
    yield {**RANDOM, "optim.name": "adafactor", "optim.lr": 0.01}
    yield {**RANDOM, "optim.clip": 0.5, "optim.update": "per_layer", "optim.clip_mode": "two_pass",
           "train.global_batch": 8}  # fmt: skip


def compiled() -> Iterator[Values]:
    """Yields configurations with torch.compile, which is slow to start."""
    for weights in (BLOCKS, RANDOM, *PATHS[1:4], PATHS[4], *PLAIN):
        yield {**weights, "train.compile": True, "model.num_layers": 2}
    yield {**BLOCKS, "train.compile": True, "model.num_layers": 12, "train.activation_checkpointing": "full"}
    yield {**BLOCKS, "train.compile": True, "model.num_layers": 2, "train.dtype": "mixed"}


def fsdp() -> Iterator[Values]:
    """Yields configurations for FSDP2 on one rank."""
    for dtype in DTYPES:
        for shard in ("factors", "all"):
            for weights in (RANDOM, BLOCKS):
                yield {**weights, "train.dtype": dtype, "parallel.shard": shard}
    for more in (
        {"optim.state_bits": 8}, {"optim.state_bits": 4, "optim.update": "per_layer"}, {"parallel.cpu_offload": True},
        {"optim.update": "per_layer"}, {"train.activation_checkpointing": "full"}, {"parallel.accumulate": "local"},
        {"train.compile": True, "model.num_layers": 2}, {"reparam.method": "full"}, {"optim.clip": 0.5},
        {"parallel.reshard_after_forward": False},
    ):  # fmt: skip
        yield {**BLOCKS, **more}
    yield {**RANDOM, "optim.state_bits": 8, "optim.update": "per_layer", "parallel.shard": "all"}


def zero() -> Iterator[Values]:
    """Yields configurations for DeepSpeed on one rank."""
    for stage in (1, 2, 3):
        for dtype in DTYPES:
            yield {**BLOCKS, "parallel.zero_stage": stage, "train.dtype": dtype}
        yield {**RANDOM, "parallel.zero_stage": stage, "parallel.shard": "all"}
        yield {**BLOCKS, "parallel.zero_stage": stage, "train.activation_checkpointing": "full", "optim.clip": 0.5}
        yield {"reparam.method": "full", "parallel.zero_stage": stage}
    yield {**BLOCKS, "parallel.zero_stage": 3, "train.compile": True, "model.num_layers": 2}
    yield {**RANDOM, "parallel.zero_stage": 2, "parallel.cpu_offload": True,
           "train.dtype": "mixed"}  # fmt: skip
    yield {**RANDOM, "parallel.zero_stage": 3, "parallel.cpu_offload": True,
           "train.dtype": "mixed"}  # fmt: skip


def small_models() -> Iterator[Values]:
    """Yields configurations of whole 130M models."""
    base: Values = {"preset": "llama_130m", "train.micro_batch": 64, "train.global_batch": 64}
    for weights in ({"reparam.method": "full"}, {"reparam.support": "blocks"}, BLOCKS, RANDOM,
                    {"reparam.method": "lowrank"}):  # fmt: skip
        yield {**base, **weights}
    for weights in ({"reparam.method": "full"}, BLOCKS, {"reparam.method": "lowrank"}):
        yield {**base, **weights, "train.compile": True}


def one_billion() -> Iterator[Values]:
    """Yields configurations of whole 1B models."""
    base: Values = {"preset": "llama_1b", "train.micro_batch": 32, "train.global_batch": 32}
    full: Values = {"reparam.method": "full"}
    for weights in (full, BLOCKS, RANDOM, {"reparam.method": "lowrank"}):
        yield {**base, **weights}
    for weights in (BLOCKS, full):
        yield {**base, **weights, "train.compile": True}
    yield {**base, "reparam.support": "blocks", "reparam.path": "materialize"}
    yield {**base, "reparam.support": "stratified", "reparam.path": "materialize"}
    yield {**base, **BLOCKS, "optim.state_bits": 8, "optim.update": "per_layer"}
    yield {**base, **BLOCKS, **LOW_MEMORY, "train.micro_batch": 32, "train.global_batch": 32}


def seven_billion() -> Iterator[Values]:
    """Yields configurations of whole 7B models: the paper's settings and those with the least memory come first."""
    base: Values = {"preset": "llama_7b", "train.micro_batch": 8, "train.global_batch": 8}
    yield {**base, **RANDOM, "optim.state_bits": 8, "optim.update": "per_layer"}
    yield {**base, **BLOCKS, **LOW_MEMORY, "train.micro_batch": 1, "train.global_batch": 1, "optim.state_bits": 4,
           "reparam.weight_bits": 8}  # fmt: skip
    yield {**base, **BLOCKS}
    yield {**base, **BLOCKS, "optim.state_bits": 8, "optim.update": "per_layer"}
    yield {**base, **BLOCKS, **LOW_MEMORY}
    yield {**base, **RANDOM}


SETS = {
    "engines": engines, "ddp": ddp, "compiled": compiled, "fsdp": fsdp, "zero": zero, "130m": small_models,
    "1b": one_billion, "7b": seven_billion,
}  # fmt: skip
"""The configurations of tools/gpu_runs.py, by name; the most valuable of each set come first."""

TINY: Values = {
    "model.vocab_size": 256,
    "model.hidden_size": 64,
    "model.intermediate_size": 160,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "reparam.rank": 8,
    "reparam.density": 0.1,
    "data.seq_len": 32,
    "train.micro_batch": 2,
}
"""Sizes of a rehearsal."""


def rows(name: str, *, rehearse: bool = False) -> Iterator[tuple[Values, Values]]:
    """Yields the configurations of a set: what distinguishes each, and all of its values.

    Args:
        name: Name of the set.
        rehearse: Whether to make the models tiny. The number of micro-batches in an update stays as it is.
    """
    engine = name if name in ("fsdp", "zero") else "ddp"
    for values in SETS[name]():
        whole = {**({} if "preset" in values else SMALL), "parallel.engine": engine, **values}
        if rehearse:
            passes = whole["train.global_batch"] // whole["train.micro_batch"]
            whole |= {**TINY, "train.global_batch": passes * TINY["train.micro_batch"]}
        yield values, whole


def nested(values: Values) -> dict[str, Any]:
    """Returns the configuration as `build_config` takes it, by section."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        section, _, field = key.partition(".")
        if field:
            result.setdefault(section, {})[field] = value
        else:
            result[key] = value
    return result
