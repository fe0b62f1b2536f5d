#!/usr/bin/env python
"""Times whole models, forward, backward and update: tokens/s relative to the full-rank model of the same preset.

    python tools/bench_model.py --preset 130m --dtype fp32 --micro-batch 8 --seq-len 256

All models are in memory together and take turns; ratios above 1 are faster than full rank.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from benchmarking import add_measuring_options, conditions, median_times, peak_bytes, positive, sizes, some_of, table

from sltrain_dist.config.load import build_config
from sltrain_dist.models.build import build_model
from sltrain_dist.optim.factory import make_optimizer
from sltrain_dist.runtime.malloc import keep_freed_memory
from sltrain_dist.streams import replace_unprintable

METHODS = {
    "full": {"method": "full"},
    "lowrank": {"method": "lowrank"},
    **{
        f"{support} {path}": {"support": support, "path": path}
        for support in ("random", "stratified", "blocks")
        for path in ("materialize", "factored", "auto")
    },
}


def make_step(preset: str, method: str, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that makes one update of a model on fixed random tokens."""
    config = build_config(
        {
            "preset": f"llama_{preset}",
            "reparam": METHODS[method],
            "data": {"seq_len": args.seq_len},
            "train": {"dtype": args.dtype, "micro_batch": args.micro_batch},
        }
    )
    model = build_model(config, args.device)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(model.named_parameters(), config.optim)
    ids = torch.randint(config.model.vocab_size, (args.micro_batch, args.seq_len), device=args.device)

    def step() -> None:
        loss = model(ids, ids)
        (loss / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="130m", choices=sizes())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--micro-batch", type=positive, default=8)
    parser.add_argument("--seq-len", type=positive, default=256)
    usual = "random auto,stratified auto,blocks auto"
    parser.add_argument("--methods", type=some_of(METHODS), default=usual, help="comma-separated, in addition to full")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--compile", action="store_true")
    add_measuring_options(parser)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    methods = list(dict.fromkeys(["full", *args.methods]))  # speed-ups are relative to full
    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as in training
    steps = {method: make_step(args.preset, method, args) for method in methods}
    times = median_times(steps, args.repeats, device, warm_up=3, cpu_time=args.cpu_time)
    tokens = args.micro_batch * args.seq_len
    rows: list[dict[str, Any]] = [
        {
            "method": method,
            "seconds": times[method],
            "tokens_per_s": tokens / times[method],
            "speedup": times["full"] / times[method],
            "peak_bytes": peak_bytes(steps[method], device),
        }
        for method in methods
    ]
    report = {
        "preset": args.preset, "dtype": args.dtype, "micro_batch": args.micro_batch, "seq_len": args.seq_len,
        **conditions(device.type, cpu_time=args.cpu_time), "methods": rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{args.preset}, {args.dtype}, {args.micro_batch} × {args.seq_len} tokens, {report['device']}\n")
    cells = [
        [
            row["method"],
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in rows
    ]
    print(table(["method", "s", "tokens/s", "× full rank", "peak MB beyond weights and states"], cells))


if __name__ == "__main__":
    main()
