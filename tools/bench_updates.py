#!/usr/bin/env python
"""Times training steps with per-layer updates against steps with whole updates (docs/memory.md).

    python tools/bench_updates.py --preset 60m --dtypes fp32 bf16 --state-bits 16 8 --threads 1

Model, engine (one process) and optimizer are the real ones. The two models of a pair are in memory together and take
turns. In each turn, the seconds of a step with per-layer updates are divided by those of a step with whole updates; the
cost is the median of these ratios, minus 1. On a shared machine, processor time is more reliable than wall-clock time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarking import device_name, interleaved, positive, sizes, table

from sltrain_dist.config.load import build_config
from sltrain_dist.models.build import build_model
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.streams import replace_unprintable
from sltrain_dist.train.step import forward_backward

UPDATES = ("whole", "per_layer")


def make_step(args: argparse.Namespace, dtype: str, state_bits: int, update: str) -> Callable[[], None]:
    """Returns a function that makes one training step of a model on fixed random tokens."""
    config = build_config(
        {
            "preset": f"llama_{args.preset}",
            "data": {"seq_len": args.seq_len},
            "optim": {"state_bits": state_bits, "update": update, "clip": args.clip},
            "train": {"dtype": dtype, "micro_batch": args.micro_batch, "global_batch": args.micro_batch},
        }
    )
    env = Environment(0, 1, 0, torch.device(args.device))
    engine = DDPEngine(build_model(config, args.device), config.optim, env)
    rows = torch.randint(config.model.vocab_size, (args.micro_batch, args.seq_len + 1), dtype=torch.int32).numpy()
    norm: float | None = None

    def step() -> None:
        nonlocal norm
        engine.begin_update(config.optim.lr, norm)
        forward_backward(engine, rows, args.micro_batch, env)
        norm = engine.clip_gradients()
        engine.update()

    return step


def compare(args: argparse.Namespace, dtype: str, state_bits: int) -> dict[str, Any]:
    """Returns one row of the report: the medians of both kinds of updates, and of their ratio in each turn."""
    runs = {update: make_step(args, dtype, state_bits, update) for update in UPDATES}
    times = interleaved(runs, args.repeats, torch.device(args.device), warm_up=1)
    row: dict[str, Any] = {
        "dtype": dtype,
        "state_bits": state_bits,
        "repeats": args.repeats,
        "load": os.getloadavg()[0],
    }
    for clock in ("wall", "cpu"):
        whole, per_layer = ([getattr(time, clock) for time in times[update]] for update in UPDATES)
        ratios = [b / a for a, b in zip(whole, per_layer, strict=True)]
        row[clock] = {
            "whole_s": statistics.median(whole),
            "per_layer_s": statistics.median(per_layer),
            "cost": statistics.median(ratios) - 1,
            "cost_min": min(ratios) - 1,
            "cost_max": max(ratios) - 1,
        }
    tokens = args.micro_batch * args.seq_len
    return row | {f"{update}_tokens_per_s": tokens / row["wall"][f"{update}_s"] for update in UPDATES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the table, or JSON."""
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="60m", choices=sizes())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "mixed"))
    parser.add_argument("--state-bits", nargs="+", type=int, default=[16, 8], choices=(32, 16, 8, 4))
    parser.add_argument("--micro-batch", type=positive, default=8)
    parser.add_argument("--seq-len", type=positive, default=128)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0 for no clipping")
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = [compare(args, dtype, bits) for dtype, bits in itertools.product(args.dtypes, args.state_bits)]
    report = {
        "preset": args.preset, "micro_batch": args.micro_batch, "seq_len": args.seq_len, "clip": args.clip,
        "device": device_name(torch.device(args.device).type),
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    print(f"{args.preset}, {args.micro_batch} × {args.seq_len} tokens, {report['device']}\n")
    cells = [
        [
            row["dtype"],
            str(row["state_bits"]),
            *(f"{row[f'{update}_tokens_per_s']:.0f}" for update in UPDATES),
            *(f"{row[clock]['cost']:+.1%} ({row[clock]['cost_min']:+.1%}, {row[clock]['cost_max']:+.1%})"
              for clock in ("wall", "cpu")),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["parameters", "state bits", "whole, tokens/s", "per layer, tokens/s", "cost, wall", "cost, processor"]
    print(table(header, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
