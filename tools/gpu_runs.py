#!/usr/bin/env python
"""Trains many configurations for a few updates on one device: does each run, how fast, and in how much memory?

    python tools/gpu_runs.py --set engines --out engines.jsonl
    python tools/gpu_runs.py --set 1b --out 1b.jsonl                  # timed: nothing else may use the GPU
    python tools/gpu_runs.py --set fsdp --out fsdp.jsonl --beside     # beside others: its times say nothing
    python tools/gpu_runs.py --set zero --out zero.jsonl --device cpu --rehearse

Each row is a configuration in one process (fsdp and zero with NCCL): the losses of its updates on fixed random rows,
seconds of an update, and the allocator's peak in the last one compared with the planner's prediction. A failed row
contains the error, and the remaining rows are run; the exit status is then 1. Every row is written as soon as it is
finished. On the CPU, the peak is that of live tensors, in further updates (of an eager model).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from benchmarking import positive, synchronise
from gpu_sets import SETS, Values, nested, rows

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.result import Point
from sltrain_dist.models.count import model_flops_per_token
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.plan.follow import follow, replaced
from sltrain_dist.runtime import environment
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.streams import replace_unprintable
from sltrain_dist.tracking.meters import mfu, peak_flops
from sltrain_dist.train.build import start_engine
from sltrain_dist.train.dry_run import made_up_rows
from sltrain_dist.train.step import forward_backward


def train(config: Config, env: Environment, updates: int) -> dict[str, Any]:
    """Trains for some updates on the same rows, and returns losses, times and memory."""
    cuda = env.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    engine = start_engine(config, env)
    synchronise(env.device)
    built = time.perf_counter() - start
    batch = made_up_rows(config, 0, config.train.global_batch)
    losses, seconds, norm = [], [], None
    for _ in range(updates):
        synchronise(env.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        engine.begin_update(config.optim.lr, norm)
        loss, tokens = forward_backward(
            engine, batch, config.train.micro_batch, env, reset_attention=config.data.reset_attention
        )
        norm = engine.clip_gradients()
        engine.update()
        synchronise(env.device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    row = {"losses": losses, "norm": norm, "build_s": built, "seconds": seconds}
    return {**row, "tokens_per_s": tokens / statistics.median(seconds[1:]), **(_allocator(before) if cuda else {})}


def _allocator(before: int) -> dict[str, int]:
    """Returns the memory of the last update on a GPU; `before` bytes were allocated before the model."""
    free, total = torch.cuda.mem_get_info()
    return {
        "before_bytes": before,
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "device_used_bytes": total - free,
    }


def run(config: Config, env: Environment, updates: int) -> dict[str, Any]:
    """Trains a configuration; adds the planner's peak of an update, FLOP/s with all that is computed, and MFU."""
    device: DeviceType = "cuda" if env.device.type == "cuda" else "cpu"
    planned = estimate(config, device=device)
    row, step = train(config, env, updates), largest(planned.timeline)
    if device == "cpu":
        eager = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
        row["peak_bytes"] = largest(follow(eager, env)).total
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    of_type = peak and (peak.fp32 if config.train.precision.product == "float32" else peak.bf16)
    return {
        **row,
        "flops_per_s": row["tokens_per_s"] * planned.flops_per_token,
        "mfu": mfu(row["tokens_per_s"], model_flops_per_token(config.model, config.data.seq_len), of_type),
        "predicted_bytes": step.total,
        "where": f"{step.phase}: {step.where}",
        "error": step.total / row["peak_bytes"] - 1,
    }


def largest(timeline: Iterable[Point]) -> Point:
    """Returns the peak of an update."""
    return max((point for point in timeline if point.phase not in ("init", "save")), key=lambda p: p.total)


def warm_up(device: torch.device) -> None:
    """Allocates the workspaces of the matrix library, in this thread and in that of the backward pass."""
    a = torch.randn(256, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.linear(a, a).sum().backward()
    (a @ a).sum().backward()


def attempt(whole: Values, env: Environment, updates: int) -> dict[str, Any]:
    """Returns the result of a row, or the error with which it failed.

    On the CPU, models are traced by torch.compile as on a GPU, but no code is generated, which would take minutes.
    """
    gc.collect()
    if env.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()
    start = time.perf_counter()
    traced = functools.partial(torch.compile, backend="aot_eager")
    try:
        with replaced(torch, "compile", traced) if env.device.type == "cpu" else nullcontext():
            row = run(build_config(nested(whole)), env, updates)
    except Exception as error:
        row = {"failed": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-3000:]}
    return {**row, "row_s": time.perf_counter() - start}


def outcome(row: dict[str, Any]) -> str:
    """Describes a row in a few words."""
    if "failed" in row:
        return str(row["failed"][:300])
    return (
        f"{row['losses'][0]:.3f} → {row['losses'][-1]:.3f}, {row['tokens_per_s']:.0f} tokens/s, "
        f"{row['peak_bytes'] / 1e9:.3f} GB, predicted {row['error']:+.1%}"
    )


def main() -> int:
    """Runs the rows of a set; returns the exit status."""
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, choices=SETS)
    parser.add_argument("--out", required=True, type=Path, help="file of JSON lines, to append to")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--rehearse", action="store_true", help="tiny models")
    parser.add_argument("--beside", action="store_true", help="mark the rows as run beside other work")
    parser.add_argument("--updates", type=positive, default=4, help="at least 2, of which the first is not timed")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the rows to run, from 0")
    parser.add_argument("--every", type=positive, default=1, help="run only every so many rows, from the first on")
    args = parser.parse_args()
    if args.updates < 2:
        parser.error("--updates must be at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; rehearse with --device cpu --rehearse")
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # what the environment, and DeepSpeed, choose their device by
    env = environment.start(600, need_group=args.set in ("engines", "fsdp", "zero"))
    warm_up(env.device)
    failed = 0
    with args.out.open("a") as out:
        for number, (values, whole) in enumerate(rows(args.set, rehearse=args.rehearse)):
            if number % args.every or (args.only and number not in args.only):
                continue
            row: dict[str, Any] = {"set": args.set, "number": number, "alone": not args.beside, "values": values}
            row |= attempt(whole, env, args.updates)
            failed += "failed" in row
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(f"{args.set} {number} {values}: {outcome(row)} ({row['row_s']:.1f} s)", file=sys.stderr, flush=True)
    environment.stop()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
