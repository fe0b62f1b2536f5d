#!/usr/bin/env python
"""Measures the peak memory of real training steps, by configuration and category.

    python tools/bench_memory.py --preset 7b --fake           # on fake tensors: nothing is allocated, any size
    python tools/bench_memory.py --preset 60m --device cuda   # from CUDA's allocator

The model, its engine (one process) and optimizer are the real ones; the second update is measured, in which the
optimizer states are allocated from the start. On the CPU and on fake tensors, the peak is that of live tensor storages,
as a dispatch mode sees them: scratch memory inside kernels, the allocator's rounding and the device's context are not
counted. On fake tensors the model takes the routes of CUDA (numerics/device.py), so the bytes differ from the CPU's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from benchmarking import positive, sizes, some_of, table

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config, SupportKind
from sltrain_dist.memory.result import Point
from sltrain_dist.plan.follow import follow
from sltrain_dist.plan.replay import replay
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.streams import replace_unprintable
from sltrain_dist.tracking.live_bytes import storage_bytes
from sltrain_dist.train.build import start_engine
from sltrain_dist.train.dry_run import made_up_rows
from sltrain_dist.train.step import forward_backward


@dataclass(frozen=True)
class Peak:
    """The peak of live bytes, by category."""

    total: int
    parameters: int
    gradients: int
    states: int

    @property
    def other(self) -> int:
        """Supports, activations and temporaries."""
        return self.total - self.parameters - self.gradients - self.states

    @staticmethod
    def of(point: Point) -> Peak:
        """Makes a peak from a moment of a timeline."""
        groups = point.groups()
        kinds = (("factors", "sparse_values", "dense"), ("gradients",), ("states", "master_weights"))
        return Peak(point.total, *(sum(groups.get(group, 0) for group in kind) for kind in kinds))


def live_peak(config: Config, *, fake: bool) -> Peak:
    """Returns the peak of live bytes in the second update."""
    points = replay(config).timeline if fake else follow(config, Environment(0, 1, 0, torch.device("cpu")))
    return Peak.of(max((point for point in points if point.phase not in ("init", "save")), key=lambda p: p.total))


def cuda_peak(config: Config) -> Peak:
    """Returns the peak of the CUDA allocator in the second update; the categories are measured before clipping."""
    engine = start_engine(config, Environment(0, 1, 0, torch.device("cuda")))
    rows = made_up_rows(config, 0, config.train.global_batch)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        engine.begin_update(config.optim.lr, 1.0)
        forward_backward(engine, rows, config.train.micro_batch, Environment(0, 1, 0, torch.device("cuda")))
        tensors = engine.tensors()
        engine.clip_gradients()
        engine.update()
    sizes = (storage_bytes(tensors[kind]) for kind in ("parameters", "gradients", "states"))
    return Peak(torch.cuda.max_memory_allocated(), *sizes)


def configurations(args: argparse.Namespace) -> Iterator[tuple[str, Config]]:
    """Yields the name and configuration of each row of the table."""

    def row(name: str, reparam: dict[str, Any], bits: int, update: str, **train: Any) -> tuple[str, Config]:
        values = {
            "preset": f"llama_{args.preset}",
            "reparam": reparam,
            "data": {"seq_len": args.seq_len},
            "optim": {"state_bits": bits, "update": update},
            "parallel": {"engine": "ddp"},
            "train": {"micro_batch": args.batch, "global_batch": args.batch, "dtype": args.dtype, **train},
        }
        return name, build_config(values)

    yield row("full rank, 16-bit, whole", {"method": "full"}, 16, "whole")
    yield row("full rank, 8-bit, per_layer", {"method": "full"}, 8, "per_layer")
    for support in args.supports:
        reparam = {"method": "sltrain", "support": support}
        for bits in (16, 8, 4):
            for update in ("whole", "per_layer"):
                yield row(f"{support}, {bits}-bit, {update}", reparam, bits, update)
        for bits in (8, 4):
            name = f"{support}, {bits}-bit, per_layer, checkpointing"
            yield row(name, reparam, bits, "per_layer", activation_checkpointing="full")
        name = f"{support}, 4-bit, per_layer, checkpointing, int8 weights"
        yield row(name, {**reparam, "weight_bits": 8}, 4, "per_layer", activation_checkpointing="full")


def main() -> None:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="60m", choices=sizes())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--fake", action="store_true", help="fake tensors: shapes and types only")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32", "mixed"))
    parser.add_argument("--batch", type=positive, default=1, help="sequences")
    parser.add_argument("--seq-len", type=positive, default=256)
    supports = get_args(SupportKind)
    parser.add_argument("--supports", type=some_of(supports), default=supports, help="comma-separated; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.fake and args.device == "cuda":
        parser.error("--fake needs no device; leave out --device")
    rows = []
    for name, config in configurations(args):
        peak = cuda_peak(config) if args.device == "cuda" else live_peak(config, fake=args.fake)
        rows.append({"configuration": name, "peak_bytes": peak.total, "other_bytes": peak.other, **parts(peak)})
    method = "CUDA allocator" if args.device == "cuda" else f"live storages, {'fake' if args.fake else 'real'} tensors"
    if args.json:
        shape = {"preset": args.preset, "batch": args.batch, "seq_len": args.seq_len, "dtype": args.dtype}
        print(json.dumps({**shape, "method": method, "torch": torch.__version__, "rows": rows}, indent=1))
        return
    print(f"{args.preset}, batch {args.batch} × {args.seq_len}, {args.dtype}; GB at the peak, {method}\n")
    header = ["", "peak", "parameters", "gradients", "states", "other"]
    keys = ("peak_bytes", "parameters_bytes", "gradients_bytes", "states_bytes", "other_bytes")
    print(table(header, [[str(row["configuration"]), *(f"{row[key] / 1e9:.2f}" for key in keys)] for row in rows]))


def parts(peak: Peak) -> dict[str, int]:
    """Returns the bytes of an engine's tensors at a peak."""
    return {f"{kind}_bytes": getattr(peak, kind) for kind in ("parameters", "gradients", "states")}


if __name__ == "__main__":
    main()
