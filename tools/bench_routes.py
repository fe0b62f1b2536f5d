#!/usr/bin/env python
"""Times every route of single layers, forward and backward, on this CPU, for the cost model of sparse_lowrank/cost.py.

    python tools/bench_routes.py --shapes 60m,130m,350m,1b --dtype fp32 --threads 1 > rows.jsonl

Prints one JSON object for each layer shape: the seconds of `nn.Linear` and of each support's routes, the least of
interleaved repetitions. One thread is timed by processor time, several by wall-clock time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from bench_linear import DTYPES, groups_of
from benchmarking import interleaved, positive, sizes, some_of
from torch import nn

from sltrain_dist.runtime.malloc import keep_freed_memory
from sltrain_dist.sparse_lowrank import SLLinear, functional
from sltrain_dist.sparse_lowrank.cost import ROUTES, Route
from sltrain_dist.sparse_lowrank.devices import CPUS
from sltrain_dist.sparse_lowrank.functional import this_device
from sltrain_dist.sparse_lowrank.layer import SUPPORTS

ROUTE_NAMES = dict(zip(("dense", "mixed", "factored"), ROUTES, strict=True))
"""The routes, materialize by its backward pass."""


def step(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, route: Route | None) -> Callable[[], None]:
    """Returns a function that runs a layer forward and backward by one route."""

    def run() -> None:
        layer.zero_grad()
        if route is not None:
            functional.route_at = lambda *args: route
        layer(x.detach().requires_grad_()).backward(g)

    return run


def measure(m: int, n: int, rank: int, density: float, args: Any) -> dict[str, float]:
    """Returns the seconds of every support and route on an (m, n) layer, and of a dense layer."""
    dtype = DTYPES[args.dtype]
    x, g = torch.randn(args.tokens, n).to(dtype), torch.randn(args.tokens, m).to(dtype)
    runs = {"dense": step(nn.Linear(n, m, bias=False, dtype=dtype), x, g, None)}
    for support in SUPPORTS:
        layer = SLLinear(n, m, rank, density, 1.0, support=support, name="x.q", seed=0, dtype=dtype)
        nn.init.normal_(layer.B, std=0.02)
        for name, route in ROUTE_NAMES.items():
            runs[f"{support} {name}"] = step(layer, x, g, route)
    times = interleaved(runs, args.repeats, torch.device("cpu"))
    clock = "cpu" if args.threads == 1 else "wall"
    return {name: min(getattr(each, clock) for each in seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = this_device("cpu").name
    parser.add_argument(
        "--device", choices=CPUS, default=here, help="what an instruction set limited by hand counts as"
    )
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--shapes", type=some_of(sizes()), default="1b", help="presets, by comma: 60m,130m,350m,1b,7b")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as in training
    for preset in args.shapes:
        groups, rank, density, _ = groups_of(preset)
        for m, n in dict.fromkeys((group.m, group.n) for group in groups):
            row = {
                "device": args.device, "preset": preset, "m": m, "n": n, "rank": rank, "density": density,
                "tokens": args.tokens, "dtype": args.dtype, "threads": args.threads,
                "seconds": measure(m, n, rank, density, args),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
