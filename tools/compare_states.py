#!/usr/bin/env python
"""Trains a small model on the embedded corpus with optimizer states of several widths, over several seeds, and
compares the validation losses with those of 32 bits.

    python tools/compare_states.py --config configs/quickstart.yaml --bits 8 4 --seeds 0 1 2 -- parallel.engine=ddp

What follows "--" is set in every run. A seed sets the initial values, the supports and the order of documents.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sltrain_dist.errors import ExitCode
from sltrain_dist.train.run import pretrain

REFERENCE = 32


def final_loss(config: str, overrides: Sequence[str]) -> float:
    """Validation loss, in nats a token, at the end of a run of its own; SystemExit where the run fails."""
    with tempfile.TemporaryDirectory() as directory:
        code = pretrain(config, [*overrides, f"run_dir={directory}", "tracking.mlflow=false"])
        if code != ExitCode.DONE:
            raise SystemExit(int(code))
        lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return float([line["eval_loss"] for line in lines if "eval_loss" in line][-1])


def differences(losses: Mapping[tuple[int, int], float]) -> dict[int, list[float]]:
    """Losses by (bits, seed) as differences to the same seed's with 32 bits, by bits."""
    found: dict[int, list[float]] = {}
    for (bits, seed), loss in losses.items():
        if bits != REFERENCE:
            found.setdefault(bits, []).append(loss - losses[REFERENCE, seed])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs and prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args(arguments)
    grid = itertools.product(args.seeds, dict.fromkeys([REFERENCE, *args.bits]))
    losses = {
        (bits, seed): final_loss(args.config, [*args.overrides, f"optim.state_bits={bits}", f"seed={seed}"])
        for seed, bits in grid
    }
    if args.json:
        rows = [{"bits": bits, "seed": seed, "eval_loss": loss} for (bits, seed), loss in losses.items()]
        print(json.dumps(rows))
        return 0
    table = Table(title=f"Validation loss minus that of {REFERENCE}-bit states, nats", box=SIMPLE_HEAD)
    for heading in ("bits", "mean", "min", "max", "seeds"):
        table.add_column(heading, justify="right")
    for bits, found in differences(losses).items():
        numbers = (statistics.fmean(found), min(found), max(found))
        table.add_row(str(bits), *(f"{number:+.4f}" for number in numbers), str(len(found)))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
