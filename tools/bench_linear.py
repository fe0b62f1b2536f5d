#!/usr/bin/env python
"""Times the linear layers of a decoder layer, forward and backward: ours, the published algorithm, nn.Linear.

    python tools/bench_linear.py --shapes 1b --dtype bf16 --tokens 2048

Every method runs layers that share an input (q, k, v; gate, up) together. Times are medians of interleaved
repetitions; ratios are to nn.Linear in the same run, and lower is better.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarking import (
    add_measuring_options,
    conditions,
    median_times,
    peak_bytes,
    positive,
    saved_bytes,
    sizes,
    some_of,
    table,
)
from torch import Tensor, nn

from sltrain_dist.config.load import build_config
from sltrain_dist.models.count import block_linears
from sltrain_dist.runtime.malloc import keep_freed_memory
from sltrain_dist.sparse_lowrank import SLLinear
from sltrain_dist.sparse_lowrank.cost import choose_route
from sltrain_dist.sparse_lowrank.functional import this_device
from sltrain_dist.sparse_lowrank.layer import apply_shared
from sltrain_dist.sparse_lowrank.route_kernels import LayerShape
from sltrain_dist.streams import replace_unprintable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
METHODS = {
    f"{support} {path}": (support, path)
    for support in ("random", "stratified", "blocks")
    for path in ("materialize", "factored", "auto")
}


class PublishedFunction(torch.autograd.Function):
    """The paper's Algorithm 1 as its authors published it: int64 positions, W built twice, a dense gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, A: Tensor, V: Tensor, positions: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, B, A, V, positions)
        ctx.scale = scale
        weight = (B @ A) * scale
        weight.view(-1).scatter_add_(0, positions, V)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, V, positions = ctx.saved_tensors
        (g,) = grads
        weight = (B @ A) * ctx.scale
        weight.view(-1).scatter_add_(0, positions, V)
        dx = g @ weight
        dense = g.t() @ x
        return dx, (dense @ A.t()) * ctx.scale, (B.t() @ dense) * ctx.scale, dense.view(-1)[positions], None, None


class Published(nn.Module):
    """A linear layer with the published algorithm, made from one of our layers."""

    def __init__(self, layer: SLLinear) -> None:
        super().__init__()
        self.B, self.A, self.V = (nn.Parameter(p.detach().clone()) for p in (layer.B, layer.A, layer.V.flatten()))
        self.register_buffer("positions", layer.support.indices())
        self.scale = layer.scale

    def forward(self, x: Tensor) -> Tensor:
        return PublishedFunction.apply(x, self.B, self.A, self.V, self.positions, self.scale)


@dataclass(frozen=True)
class Group:
    """Layers of one shape that share their input."""

    names: tuple[str, ...]
    m: int
    n: int

    def __str__(self) -> str:
        return f"{', '.join(self.names)} {self.m}×{self.n}"


def groups_of(preset: str) -> tuple[list[Group], int, float, float]:
    """Returns (groups of one decoder layer, rank, density, alpha) of a preset."""
    config = build_config({"preset": f"llama_{preset}"})
    shapes = {shape.name.rpartition(".")[2].removesuffix("_proj"): shape for shape in block_linears(config.model)}
    groups = [Group(names, shapes[names[0]].m, shapes[names[0]].n) for names in GROUPS]
    return groups, config.reparam.rank, config.reparam.density, config.reparam.alpha


def make_layers(method: str, group: Group, rank: int, density: float, alpha: float, **to: Any) -> list[nn.Module]:
    """Makes the layers of a group for one method."""
    if method == "dense":
        return [nn.Linear(group.n, group.m, bias=False, **to) for _ in group.names]
    support, path = METHODS.get(method, ("random", "materialize"))
    layers = []
    for name in group.names:
        key = {"name": f"x.{name}", "seed": 0}  # the same seed, so that blocks permutes the shared input once
        layer = SLLinear(group.n, group.m, rank, density, alpha, support=support, path=path, **key, **to)
        nn.init.normal_(layer.B, std=0.02)
        layers.append(Published(layer) if method == "published" else layer)
    return layers


def measure(group: Group, methods: Sequence[str], rank: int, density: float, alpha: float, args: Any) -> list[dict]:
    """Returns times and memory of all methods on one group."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    x = torch.randn(args.tokens, group.n, device=device).to(dtype)
    output_grads = [torch.randn(args.tokens, group.m, device=device).to(dtype) for _ in group.names]

    def forward(layers: list[nn.Module]) -> list[Tensor]:
        return apply_shared(layers, x.detach().requires_grad_())

    def step(layers: list[nn.Module]) -> Callable[[], None]:
        def run() -> None:
            for layer in layers:
                layer.zero_grad()
            torch.autograd.backward(forward(layers), output_grads)

        return run

    built = {method: make_layers(method, group, rank, density, alpha, device=device, dtype=dtype) for method in methods}
    times = median_times(
        {method: step(layers) for method, layers in built.items()}, args.repeats, device, cpu_time=args.cpu_time
    )
    rows = []
    for method, layers in built.items():
        parameters = [p for layer in layers for p in (*layer.parameters(), *layer.buffers())]
        nn.ModuleList(layers).zero_grad()
        row = {
            "group": str(group),
            "method": method,
            "seconds": times[method],
            "ratio": times[method] / times["dense"],
            "peak_bytes": peak_bytes(step(layers), device),
            "saved_bytes": saved_bytes(lambda layers=layers: forward(layers), parameters),
        }
        if method.endswith("auto") and isinstance(layers[0], SLLinear):
            support = layers[0].support
            shape = LayerShape(group.m, group.n, rank, support.nnz, support.kind, len(layers))
            bits = dtype.itemsize * 8
            row["plan"] = choose_route(shape, args.tokens, bits=bits, device=this_device(device.type)).path
        rows.append(row)
    return rows


def main() -> None:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--shapes", type=some_of(sizes()), default="1b", help="presets, by comma: 60m,130m,350m,1b,7b")
    methods = ("dense", "published", *METHODS)
    parser.add_argument(
        "--methods", type=some_of(methods), default=methods, help="comma-separated, in addition to dense; default: all"
    )
    parser.add_argument("--rank", type=positive, default=None, help="instead of the preset's")
    parser.add_argument("--repeats", type=positive, default=7)
    add_measuring_options(parser)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()  # as in training
    methods = list(dict.fromkeys(["dense", *args.methods]))  # ratios are relative to dense
    report: dict[str, Any] = {
        **conditions(args.device, cpu_time=args.cpu_time),
        "dtype": args.dtype, "tokens": args.tokens, "presets": {},
    }  # fmt: skip
    for preset in args.shapes:
        groups, rank, density, alpha = groups_of(preset)
        rank = args.rank or rank
        rows = [row for group in groups for row in measure(group, methods, rank, density, alpha, args)]
        total = {method: sum(row["seconds"] for row in rows if row["method"] == method) for method in methods}
        block = [
            {"method": method, "seconds": seconds, "ratio": seconds / total["dense"]}
            for method, seconds in total.items()
        ]
        report["presets"][preset] = {"rank": rank, "density": density, "groups": rows, "block": block}
        if not args.json:
            print_preset(preset, report, methods)
    if args.json:
        print(json.dumps(report, indent=1))


def print_preset(preset: str, report: dict[str, Any], methods: Sequence[str]) -> None:
    """Prints one preset's tables."""
    result = report["presets"][preset]
    print(
        f"\n{preset}: rank {result['rank']}, density {result['density']}, {report['tokens']} tokens, "
        f"{report['dtype']}, {report['device']}\n"
    )
    groups = list(dict.fromkeys(row["group"] for row in result["groups"]))
    by_key = {(row["method"], row["group"]): row for row in result["groups"]}
    times, memory = [], []
    for method, total in zip(methods, result["block"], strict=True):
        cells = [by_key[method, group] for group in groups]
        times.append([method, *(f"{c['seconds'] * 1e3:.1f} ({c['ratio']:.2f})" for c in cells)])
        times[-1].append(f"{total['seconds'] * 1e3:.1f} (**{total['ratio']:.2f}**)")
        memory.append([method, *(f"{c['peak_bytes'] / 1e6:.0f} / {c['saved_bytes'] / 1e6:.0f}" for c in cells)])
    print(table(["ms (ratio)", *groups, "layer"], times))
    print("\n" + table(["MB: peak / saved", *groups], memory))


if __name__ == "__main__":
    main()
