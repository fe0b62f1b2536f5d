#!/usr/bin/env python
"""Compares the planner with replays of the training step on fake tensors, or with a GPU's allocator.

    python tools/bench_planner.py --json                      # 200 configurations, drawn with a fixed seed
    python tools/bench_planner.py --sample 8 --max-layers 4   # a quick look
    python tools/bench_planner.py --cuda                      # on one GPU: plan and replay against the allocator
    python tools/bench_planner.py --public                    # predictions of what others have measured

Configurations are drawn at random over the presets, every setting that memory depends on, and 1 to 64 ranks; those
that cannot be run are drawn again. Errors are relative to the replayed or measured bytes. Replays of 7B take up to a
minute each. `--rows` saves the results, so that an interrupted benchmark can be continued.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from bench_memory import cuda_peak
from benchmarking import positive, table
from public_measurements import as_json, as_markdown, read_measurements

from sltrain_dist.config.load import build_config
from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.result import Estimate, Group, Point
from sltrain_dist.plan.replay import replay
from sltrain_dist.streams import replace_unprintable

LEVERS: dict[str, tuple[Any, ...]] = {
    "reparam.method": ("sltrain", "sltrain", "sltrain", "full", "lowrank"),
    "reparam.support": ("random", "stratified", "blocks"),
    "reparam.weight_bits": (16, 16, 8),
    "reparam.density": (0.01, 0.03, 0.05, 0.1),
    "reparam.path": ("auto", "materialize", "factored"),
    "reparam.row_block_bytes": (None, None, 1 << 20, 1 << 24),
    "data.batching": ("pack",),
    "data.reset_attention": (False, False, True),
    "data.seq_len": (128, 256, 512, 1024, 2048),
    "optim.name": ("adamw", "adamw", "adam", "sgd", "sgd", "adafactor"),
    "optim.state_bits": (32, 16, 8, 4),
    "optim.master_weights": (False, True),
    "optim.stochastic_rounding": (False, True),
    "optim.weight_decay": (0.0, 0.1),
    "optim.clip": (0.0, 1.0),
    "optim.update": ("whole", "per_layer"),
    "optim.clip_mode": ("previous_norm", "per_parameter", "two_pass"),
    "parallel.engine": ("ddp", "fsdp"),
    "parallel.shard": ("factors", "all"),
    "parallel.accumulate": ("auto", "local", "sharded"),
    "parallel.replicas": (1, 1, 2),
    "parallel.reshard_after_forward": (True, False),
    "parallel.prefetch_blocks": (1, 2),
    "train.dtype": ("bf16", "bf16", "fp32", "mixed"),
    "train.micro_batch": (1, 2, 4, 8),
    "train.activation_checkpointing": ("none", "full", "selective"),
    "train.checkpoint_policy": ("blocks", "attention", "ops"),
    "train.checkpoint_every": (2, 3),
    "train.loss_chunk_tokens": (None, None, 0, 256),
}
"""Values that each setting is drawn from; a value that is listed twice is drawn twice as often."""

RANKS = (1, 2, 4, 8, 16, 32, 64)
RANK_DIVISORS = (1, 2, 4)
"""Divisors of the preset's rank."""
ACCUMULATION = (1, 2, 4)
"""Numbers of micro-batches in an update."""


def cases(seed: int, count: int, *, max_layers: int | None, on_one: bool) -> Iterator[dict[str, Any]]:
    """Yields the configurations of a seed, as arguments of `build_config`, with their numbers of ranks."""
    rng = random.Random(seed)
    num_cases = 0
    while num_cases < count:
        preset = rng.choice(list(PRESETS))
        values: dict[str, Any] = {"preset": preset}
        for lever, choices in LEVERS.items():
            section, _, field = lever.partition(".")
            values.setdefault(section, {})[field] = rng.choice(choices)
        values["reparam"]["rank"] = PRESETS[preset]["reparam"]["rank"] // rng.choice(RANK_DIVISORS)
        ranks = 1 if on_one else rng.choice(RANKS)
        if on_one:  # fsdp would need a process group, and shards nothing on one rank
            values["parallel"]["engine"] = "ddp"
        passes = rng.choice(ACCUMULATION)
        values["train"]["global_batch"] = ranks * passes * values["train"]["micro_batch"]
        if max_layers is not None:
            values["model"] = {"num_layers": min(max_layers, PRESETS[preset]["model"]["num_layers"])}
        if not _can_run(values, ranks):
            continue
        num_cases += 1
        yield {"values": values, "ranks": ranks}


def _can_run(values: dict[str, Any], ranks: int) -> bool:
    replicas = values["parallel"]["replicas"]
    if replicas > 1 and (ranks % replicas or ranks == replicas):
        return False
    try:
        micro_batches_per_update(build_config(values), ranks)
    except ConfigError:
        return False
    return True


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Compares a plan with a replay: the peak, the peak of each phase, and the groups at the peak."""
    torch.set_num_threads(1)
    config, start = build_config(case["values"]), time.perf_counter()
    replayed = replay(config, case["ranks"])
    middle = time.perf_counter()
    predicted = estimate(config, ranks=case["ranks"])
    groups = {name: (predicted.peak.groups().get(name, 0), replayed.peak.groups().get(name, 0)) for name in _groups()}
    both = predicted.phases().keys() & replayed.phases().keys()
    return {
        **case,
        "predicted_bytes": predicted.peak_bytes,
        "bytes": replayed.peak_bytes,
        "error": predicted.peak_bytes / replayed.peak_bytes - 1,
        "peak": [f"{e.peak.phase}: {e.peak.where}" for e in (predicted, replayed)],
        "phases": {phase: predicted.peak_of(phase).total / replayed.peak_of(phase).total - 1 for phase in sorted(both)},
        "components": {name: (found - true) / replayed.peak_bytes for name, (found, true) in groups.items()},
        "replay_s": middle - start,
        "estimate_s": time.perf_counter() - middle,
    }


def compare_on_gpu(case: dict[str, Any]) -> dict[str, Any] | None:
    """Compares plan and replay with the allocator; None if the run is not measured, because it will not fit."""
    config = build_config(case["values"])
    predicted = estimate(config)
    memory = torch.cuda.get_device_properties(0).total_memory
    if predicted.device_bytes > memory:
        return None
    try:
        measured = cuda_peak(config).total
    except torch.OutOfMemoryError:
        return {**case, "false_fit": True}
    finally:
        torch.cuda.empty_cache()
    step, replayed = (_step_peak(e).total for e in (predicted, replay(config)))
    return {
        **case,
        "false_fit": False,
        "predicted_bytes": step,
        "replayed_bytes": replayed,
        "bytes": measured,
        "error": step / measured - 1,
        "replay_error": replayed / measured - 1,
    }


def _step_peak(estimated: Estimate) -> Point:
    """Returns the peak of a training step, without building and saving, as `cuda_peak` measures it."""
    return max((point for point in estimated.timeline if point.phase not in ("init", "save")), key=lambda p: p.total)


def _groups() -> tuple[str, ...]:
    return get_args(Group)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians and worst cases of the errors' magnitudes."""
    measured = [row for row in rows if "error" in row]
    result = {"compared": len(measured), "peak": _spread([row["error"] for row in measured])}
    if any("replay_error" in row for row in measured):
        result["replay"] = _spread([row["replay_error"] for row in measured])
        result["false_fits"] = sum(row["false_fit"] for row in rows)
    if any("components" in row for row in measured):
        for key in ("phases", "components"):
            names = dict.fromkeys(name for row in measured for name in row[key])
            result[key] = {name: _spread([row[key][name] for row in measured if name in row[key]]) for name in names}
    return result


def _spread(errors: list[float]) -> dict[str, float]:
    magnitudes = sorted(abs(error) for error in errors) or [0.0]
    largest = max(errors, key=abs, default=0.0)
    return {
        "median": statistics.median(magnitudes),
        "p95": magnitudes[int(0.95 * (len(magnitudes) - 1))],
        "worst": largest,
    }


def run(todo: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields rows as they are finished; rows that `--rows` already contains are not computed again."""
    known: dict[str, dict[str, Any]] = {}
    if args.rows is not None and args.rows.exists():
        lines = (json.loads(line) for line in args.rows.read_text().splitlines())
        known = {_key(row): row for row in lines}
    yield from (known[_key(case)] for case in todo if _key(case) in known)
    missing = [case for case in todo if _key(case) not in known]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        made = filter(None, map(compare_on_gpu, missing)) if args.cuda else pool.map(compare, missing)
        for row in made:
            if args.rows is not None:
                with args.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            yield row


def _key(case: dict[str, Any]) -> str:
    return json.dumps([case["values"], case["ranks"]], sort_keys=True)


def main() -> None:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=positive, default=200, help="number of configurations")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--jobs", type=positive, default=1, help="number of processes")
    parser.add_argument("--max-layers", type=positive, help="limit the depth of the models, for speed")
    parser.add_argument("--cuda", action="store_true", help="measure on this machine's GPU, with one rank")
    parser.add_argument(
        "--public", action="store_true", help="only predict the rows of docs/reports/public-measurements.csv"
    )
    parser.add_argument("--rows", type=Path, help="file of JSON lines, one per configuration, to append to")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.cuda and not torch.cuda.is_available():
        parser.error("--cuda needs a GPU, but torch finds none")
    if args.public:
        try:
            measured = read_measurements()
        except ConfigError as error:
            parser.error(str(error))
        print(json.dumps(as_json(measured), indent=1) if args.json else as_markdown(measured))
        return
    rows: list[dict[str, Any]] = []
    for row in run(list(cases(args.seed, args.sample, max_layers=args.max_layers, on_one=args.cuda)), args):
        rows.append(row)
        outcome = "out of memory" if "error" not in row else f"{row['error']:+.2%} of {row['bytes'] / 1e9:.2f} GB"
        print(f"{len(rows)}: {row['values']['preset']}, {row['ranks']} ranks: {outcome}", file=sys.stderr, flush=True)
    result = {"seed": args.seed, "torch": torch.__version__, **summary(rows)}
    if args.json:
        print(json.dumps({**result, "rows": rows}, indent=1))
        return
    print(f"{result['compared']} configurations; errors of the peak, and of its parts as shares of the peak\n")
    lines = [("peak", result["peak"]), *([("replay", result["replay"])] if "replay" in result else [])]
    for key in ("phases", "components"):
        lines += [(f"{name}", spread) for name, spread in result.get(key, {}).items()]
    print(table(["", "median", "95 %", "worst"], [[name, *(f"{s[k]:+.2%}" for k in s)] for name, s in lines]))


if __name__ == "__main__":
    main()
