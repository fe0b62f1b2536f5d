#!/usr/bin/env python
"""Trains many configurations for a few updates on one GPU: does each run, how fast, and in how much memory?

    python tools/gpu_runs.py --set ddp --out ddp.jsonl
    python tools/gpu_runs.py --set 1b --out 1b.jsonl      # timed: nothing else may use the GPU

Each row is a configuration in one process (fsdp and zero with NCCL): the losses of its updates on fixed random rows,
seconds of an update, and the allocator's peak in the last one compared with the planner's prediction. A failed row
contains the error, and the remaining rows are run. Every row is written as soon as it is finished.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.runtime import environment
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.streams import replace_unprintable
from sltrain_dist.train.build import start_engine
from sltrain_dist.train.dry_run import made_up_rows
from sltrain_dist.train.step import forward_backward

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


def one_billion() -> Iterator[Values]:
    """Yields configurations of whole 1B models."""
    base: Values = {"preset": "llama_1b", "train.micro_batch": 32, "train.global_batch": 32}
    for weights in (
        {"reparam.method": "full"}, BLOCKS, {**BLOCKS, "reparam.path": "materialize"}, RANDOM,
        {"reparam.method": "lowrank"}, {"reparam.support": "stratified", "reparam.path": "materialize"},
    ):  # fmt: skip
        yield {**base, **weights}
    yield {**base, **BLOCKS, "train.compile": True}
    yield {**base, "reparam.method": "full", "train.compile": True}
    yield {**base, **BLOCKS, "optim.state_bits": 8, "optim.update": "per_layer"}
    yield {**base, **BLOCKS, **LOW_MEMORY, "train.micro_batch": 32, "train.global_batch": 32}


def seven_billion() -> Iterator[Values]:
    """Yields configurations of whole 7B models: the paper's settings, and those with the least memory."""
    base: Values = {"preset": "llama_7b", "train.micro_batch": 8, "train.global_batch": 8}
    yield {**base, **BLOCKS}
    yield {**base, **BLOCKS, "optim.state_bits": 8, "optim.update": "per_layer"}
    yield {**base, **BLOCKS, **LOW_MEMORY}
    yield {**base, **BLOCKS, **LOW_MEMORY, "train.micro_batch": 1, "train.global_batch": 1, "optim.state_bits": 4,
           "reparam.weight_bits": 8}  # fmt: skip
    yield {**base, **RANDOM, "optim.state_bits": 8, "optim.update": "per_layer"}
    yield {**base, **RANDOM}


SETS = {"ddp": ddp, "compiled": compiled, "fsdp": fsdp, "zero": zero, "1b": one_billion, "7b": seven_billion}


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


def train(config: Config, env: Environment, updates: int) -> dict[str, Any]:
    """Trains for some updates on the same rows, and returns losses, times and memory."""
    predicted = estimate(config)
    step = max((point for point in predicted.timeline if point.phase not in ("init", "save")), key=lambda p: p.total)
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    engine = start_engine(config, env)
    torch.cuda.synchronize()
    built = time.perf_counter() - start
    rows = made_up_rows(config, 0, config.train.global_batch)
    losses, seconds, norm = [], [], None
    for _ in range(updates):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        engine.begin_update(config.optim.lr, norm)
        loss, tokens = forward_backward(
            engine, rows, config.train.micro_batch, env, reset_attention=config.data.reset_attention
        )
        norm = engine.clip_gradients()
        engine.update()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    median = statistics.median(seconds[1:])
    return {
        "losses": losses,
        "norm": norm,
        "build_s": built,
        "seconds": seconds,
        "tokens_per_s": tokens / median,
        "flops_per_s": tokens * predicted.flops_per_token / median,
        "before_bytes": before,
        "allocated_bytes": peak,
        "reserved_bytes": reserved,
        "predicted_bytes": step.total,
        "where": f"{step.phase}: {step.where}",
        "error": step.total / (peak - before) - 1,
        "device_used_bytes": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0],
    }


def warm_up(device: torch.device) -> None:
    """Allocates the workspaces of the matrix library, in this thread and in that of the backward pass."""
    a = torch.randn(256, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.linear(a, a).sum().backward()
    (a @ a).sum().backward()


def main() -> None:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, choices=SETS)
    parser.add_argument("--out", required=True, type=Path, help="file of JSON lines")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the rows to run, from 0")
    args = parser.parse_args()
    engine = args.set if args.set in ("fsdp", "zero") else "ddp"
    env = environment.start(600, need_group=engine != "ddp")
    warm_up(env.device)
    with args.out.open("a") as out:
        for number, values in enumerate(SETS[args.set]()):
            if args.only and number not in args.only:
                continue
            row: dict[str, Any] = {"set": args.set, "number": number, "values": values}
            gc.collect()
            torch.cuda.empty_cache()
            torch.compiler.reset()
            start = time.perf_counter()
            try:
                base = SMALL if "preset" not in values else {}
                merged = {**base, **values, "parallel.engine": engine}
                row |= train(build_config(nested(merged)), env, args.updates)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:2000]
                row["traceback"] = traceback.format_exc()[-3000:]
            row["row_s"] = time.perf_counter() - start
            out.write(json.dumps(row) + "\n")
            out.flush()
            outcome = row.get("failed", "")[:300] or (
                f"{row['losses'][0]:.3f} → {row['losses'][-1]:.3f}, {row['tokens_per_s']:.0f} tokens/s, "
                f"{row['allocated_bytes'] / 1e9:.3f} GB, predicted {row['error']:+.1%}"
            )
            print(f"{args.set} {number} {values}: {outcome} ({row['row_s']:.1f} s)", file=sys.stderr, flush=True)
    environment.stop()


if __name__ == "__main__":
    main()
