#!/usr/bin/env python
"""Times the linear layers of a decoder layer kernel by kernel, beside what the roofline predicts for them.

    python tools/gpu_layer.py --shapes 1b,7b --dtype bf16 --tokens 8192 --out layer.jsonl
    python tools/gpu_layer.py --shapes 60m --tokens 64 --device cpu --out layer.jsonl      # a rehearsal

The first line has the rates of the device: of a matrix product, of a copy, and of launches. Then follows a line for
every group of layers that share an input, and one for all of them, each written as soon as it is measured. `ratio` is
to nn.Linear by wall clock, as of tools/bench_linear.py. `kernels_s` is the time that the kernels take by themselves, by
torch's profiler; where it is much less than `seconds`, the host bounds the layer. `predicted_s` and `predicted` are the
roofline's (sltrain_dist/sparse_lowrank/cost.py), with the launches of the host, for the device named in `roofline`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_linear import DTYPES, METHODS, Group, groups_of, make_layers, measure
from benchmarking import median_times, positive, sizes, some_of, synchronise
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sltrain_dist.runtime.malloc import keep_freed_memory
from sltrain_dist.sparse_lowrank import SLLinear
from sltrain_dist.sparse_lowrank.cost import ROUTES, choose_route, kernel_seconds
from sltrain_dist.sparse_lowrank.devices import GPUS, Device
from sltrain_dist.sparse_lowrank.functional import this_device
from sltrain_dist.sparse_lowrank.layer import apply_shared
from sltrain_dist.sparse_lowrank.route_kernels import ROUTE_KERNELS, Kernel, LayerShape, RouteKernels, dense_kernels
from sltrain_dist.streams import replace_unprintable

LARGEST = 24
"""Number of kernels of a method that are written, the slowest first."""
USUAL = "published,random materialize,stratified materialize,blocks materialize,blocks factored,blocks auto"


def roofline_device(device: torch.device) -> Device:
    """Returns the device of the cost model that is this one; for a GPU that it does not know, the one of all routes."""
    if device.type == "cpu":
        return this_device("cpu")
    words = set(re.split(r"[ -]", torch.cuda.get_device_name()))
    known = [name for name in GPUS if set(name.split()) <= words]
    return GPUS[max(known, key=len)] if known else this_device("cuda")


def rates(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> dict[str, float]:
    """Measures a product of matrices of size², a copy of 8·size² values, and small launches, one after another."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(8 * size, size, device=device, dtype=dtype)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(100):
            one.add_(1)

    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source), "launches": launches}
    seconds = median_times(runs, repeats, device, warm_up=2)
    return {
        "matrix_flops": 2 * size**3 / seconds["product"],
        "copy_bytes_per_s": 2 * source.nbytes / seconds["copy"],
        "launch_s": seconds["launches"] / 100,
    }


def kernels_of(step: Callable[[], None], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Returns what a step runs on the device (on the CPU: torch's operators): name, count and seconds of one step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    step()
    synchronise(device)
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
        synchronise(device)
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiler.events() or ():
        if event.device_type != wanted or getattr(event, "is_user_annotation", False):
            continue
        micros = event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total
        sums[event.name][0] += 1 / repeats
        sums[event.name][1] += micros * 1e-6 / repeats
    found = [{"name": name[:90], "count": round(count, 2), "s": s} for name, (count, s) in sums.items() if s > 0]
    return sorted(found, key=lambda kernel: -kernel["s"])


def prediction(
    method: str, group: Group, layers: Sequence[Any], tokens: int, bits: int, device: Device
) -> list[Kernel] | None:
    """Returns the kernels that the cost model lists for a group's layers; None for the published algorithm."""
    if method == "dense":
        return len(layers) * dense_kernels(group.m, group.n, tokens, bits, device)
    if not isinstance(layers[0], SLLinear):
        return None
    support, (_, path) = layers[0].support, METHODS[method]
    shape = LayerShape(group.m, group.n, layers[0].rank, support.nnz, support.kind, len(layers))
    chooses = this_device("cpu" if device.is_cpu else "cuda")
    route = choose_route(shape, tokens, bits=bits, device=chooses, path=path)
    return ROUTE_KERNELS[ROUTES.index(route)](RouteKernels(shape, tokens, bits, device))


def listed(kernels: Iterable[Kernel], bits: int, device: Device) -> list[dict[str, Any]]:
    """Returns predicted kernels as `kernels_of` returns measured ones, with what runs them."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for kernel in kernels:
        entry = sums[kernel.name, kernel.unit]
        entry[0] += kernel.launches
        entry[1] += kernel_seconds([kernel], bits, device)
    found = [{"name": name, "unit": unit, "count": count, "s": s} for (name, unit), (count, s) in sums.items()]
    return sorted(found, key=lambda kernel: -kernel["s"])


def measure_group(preset: str, group: Group, methods: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the line of a group."""
    _, rank, density, alpha = groups_of(preset)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    model, bits = roofline_device(device), dtype.itemsize * 8
    found = []
    for row in measure(group, methods, rank, density, alpha, args):
        layers = make_layers(row["method"], group, rank, density, alpha, device=device, dtype=dtype)
        x = torch.randn(args.tokens, group.n, device=device).to(dtype)
        grads = [torch.randn(args.tokens, group.m, device=device).to(dtype) for _ in group.names]

        def step(layers: list[Any] = layers, x: torch.Tensor = x, grads: list[torch.Tensor] = grads) -> None:
            for layer in layers:
                layer.zero_grad()
            torch.autograd.backward(apply_shared(layers, x.detach().requires_grad_()), grads)

        kernels = kernels_of(step, device, args.repeats)
        expected = prediction(row["method"], group, layers, args.tokens, bits, model)
        found.append(
            {key: row[key] for key in ("method", "seconds", "ratio", "peak_bytes", "saved_bytes")}
            | {"kernels_s": sum(kernel["s"] for kernel in kernels), "kernels": kernels[:LARGEST]}
            | {"predicted_s": None if expected is None else kernel_seconds(expected, bits, model)}
            | {"predicted": [] if expected is None else listed(expected, bits, model)}
        )
    return {"group": str(group), "methods": found}


def total(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the sums of a decoder layer by method, and their ratios to nn.Linear."""
    keys = ("seconds", "kernels_s", "predicted_s")
    sums: dict[str, dict[str, Any]] = {}
    for row in (row for line in lines for row in line["methods"]):
        entry = sums.setdefault(row["method"], dict.fromkeys(keys, 0.0))
        for key in keys:
            entry[key] = None if row[key] is None or entry[key] is None else entry[key] + row[key]
    return [
        {"method": method, **entry}
        | {f"{key.removesuffix('_s')}_ratio": entry[key] and entry[key] / sums["dense"][key] for key in keys}
        for method, entry in sums.items()
    ]


def main() -> None:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="file of JSON lines, to append to")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--shapes", type=some_of(sizes()), default="1b,7b", help="presets, by comma")
    parser.add_argument("--methods", type=some_of(("dense", "published", *METHODS)), default=USUAL, help="by comma")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--rate-size", type=positive, default=8192, help="rows of the matrices for the device's rates")
    args = parser.parse_args()
    args.cpu_time = False
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; rehearse with --device cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as in training
    methods = list(dict.fromkeys(["dense", *args.methods]))  # ratios are relative to dense
    with args.out.open("a") as out:

        def write(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        write({"roofline": roofline_device(device).name, "rates": rates(device, DTYPES[args.dtype], args.rate_size, 5)})
        for preset in args.shapes:
            lines = []
            for group in groups_of(preset)[0]:
                lines.append(measure_group(preset, group, methods, args))
                write({"preset": preset, "tokens": args.tokens, "dtype": args.dtype, **lines[-1]})
                print(f"{preset}, {group}", file=sys.stderr, flush=True)
            write({"preset": preset, "tokens": args.tokens, "dtype": args.dtype, "layer": total(lines)})


if __name__ == "__main__":
    main()
