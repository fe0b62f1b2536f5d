#!/usr/bin/env python
"""Predicts the time of the linear layers of a decoder layer by the cost model, as ratios to nn.Linear. Needs no GPU.

    python tools/roofline.py --shapes 1b,7b --devices "A100,H100,H200,RTX 4090" --tokens 8192 --json
    python tools/roofline.py --measured docs/reports/2026-11-27-cost-model/cpu.jsonl

Times are those of the forward and the backward pass together, launches included. The second form compares predictions
with what tools/bench_routes.py measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarking import positive, sizes, some_of, table

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import SupportKind
from sltrain_dist.models.count import block_linears
from sltrain_dist.sparse_lowrank.cost import ROUTES, choose_route, kernel_seconds, route_seconds
from sltrain_dist.sparse_lowrank.devices import CPUS, GPUS
from sltrain_dist.sparse_lowrank.route_kernels import LayerShape, dense_kernels
from sltrain_dist.sparse_lowrank.sizes import nonzeros

DEVICES = {**GPUS, **CPUS}
SUPPORTS: tuple[SupportKind, ...] = ("random", "stratified", "blocks")
ROUTE_NAMES = ("dense", "mixed", "factored")
DEFAULT = "A100,H100,H200,RTX 4090"


def predict(preset: str, name: str, support: SupportKind, tokens: int, bits: int) -> list[dict[str, Any]]:
    """Returns the predicted times of each linear layer of a preset."""
    config, device = build_config({"preset": f"llama_{preset}", "reparam": {"support": support}}), DEVICES[name]
    rows: list[dict[str, Any]] = []
    for linear in block_linears(config.model):
        shape = LayerShape.of(linear.m, linear.n, config.reparam, linear.sharing)
        dense = kernel_seconds(dense_kernels(linear.m, linear.n, tokens, bits, device), bits, device)
        seconds = route_seconds(shape, tokens, bits=bits, device=device)
        auto = choose_route(shape, tokens, bits=bits, device=device)
        rows.append({
            "preset": preset, "device": name, "support": support, "tokens": tokens, "bits": bits,
            "layer": linear.name, "m": linear.m, "n": linear.n, "dense_s": dense, "materialize_s": seconds[0],
            "mixed_s": seconds[1], "factored_s": seconds[2], "auto": auto.path,
        })  # fmt: skip
    return rows


def cell(row: dict[str, Any]) -> str:
    """Formats the times of a layer as ratios: the better way of materialize, and factored."""
    best = min(row["materialize_s"], row["mixed_s"])
    ratios = [f"{seconds / row['dense_s']:.2f}" for seconds in (best, row["factored_s"])]
    chosen = 1 if row["auto"] == "factored" else 0
    ratios[chosen] = f"**{ratios[chosen]}**"
    return " / ".join(ratios)


def compare(path: Path) -> None:
    """Prints how well predictions agree with measured rows, and what auto loses to the best route."""
    errors, losses = defaultdict(list), defaultdict(list)
    for row in map(json.loads, path.read_text().splitlines()):
        device, bits, tokens = CPUS[row["device"]], 16 if row["dtype"] == "bf16" else 32, row["tokens"]
        case = (row["device"], row["dtype"], row["threads"])
        dense = kernel_seconds(dense_kernels(row["m"], row["n"], tokens, bits, device), bits, device)
        for support in SUPPORTS:
            nnz = nonzeros(row["m"], row["n"], row["density"], support)
            shape = LayerShape(row["m"], row["n"], row["rank"], nnz, support)
            predicted = [seconds / dense for seconds in route_seconds(shape, tokens, bits=bits, device=device)]
            measured = [row["seconds"][f"{support} {route}"] / row["seconds"]["dense"] for route in ROUTE_NAMES]
            errors[case] += [max(p / m, m / p) - 1 for p, m in zip(predicted, measured, strict=True)]
            chosen = ROUTES.index(choose_route(shape, tokens, bits=bits, device=device))
            losses[case].append(measured[chosen] / min(measured) - 1)
    body = []
    for case, found in errors.items():
        within, lost = statistics.mean(error <= 0.25 for error in found), losses[case]
        shares = (statistics.median(found), within, statistics.mean(lost), max(lost))
        body.append([", ".join(map(str, case)), str(len(found)), *(f"{share:.1%}" for share in shares)])
    print(table(["device, type, threads", "ratios", "median error", "within 25 %", "mean loss", "largest loss"], body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=some_of(sizes()), default="1b,7b", help="presets, by comma")
    parser.add_argument("--devices", type=some_of(DEVICES), default=DEFAULT, help=f"by comma, of: {', '.join(DEVICES)}")
    parser.add_argument("--support", choices=SUPPORTS, default="blocks")
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--bits", type=int, choices=(16, 32), default=16)
    parser.add_argument("--measured", type=Path, default=None, help="rows of tools/bench_routes.py to compare with")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each layer")
    args = parser.parse_args()
    if args.measured is not None:
        compare(args.measured)
        return
    rows = {
        (preset, name): predict(preset, name, args.support, args.tokens, args.bits)
        for preset in args.shapes
        for name in args.devices
    }
    if args.json:
        for layers in rows.values():
            for row in layers:
                print(json.dumps(row))
        return
    print(f"Predicted, not measured: {args.support}, {args.bits} bits, {args.tokens} tokens.")
    print("materialize / factored, as ratios to nn.Linear; bold is what auto takes\n")
    layers = [row["layer"].rpartition(".")[2].removesuffix("_proj") for row in next(iter(rows.values()))]
    shown = [i for i, layer in enumerate(layers) if layer in ("q", "o", "gate", "down")]  # k and v are as q, up as gate
    body = [[preset, name, *(cell(found[i]) for i in shown)] for (preset, name), found in rows.items()]
    print(table(["", "", *("q, k, v", "o", "gate, up", "down")], body))


if __name__ == "__main__":
    main()
