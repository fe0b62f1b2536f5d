#!/usr/bin/env python
"""Trains a small model with optimizer states of several widths over several seeds, and compares the validation losses
with those of 32-bit states.

    python tools/compare_states.py --out runs/compare_states
    python tools/compare_states.py --bits 4 --seeds 0 -- train.dtype=bf16 data.source=c4.json.gz

Overrides after "--" apply to every run. A seed determines the initial values, the supports and the order of documents.
Controls are runs with 32-bit states that should end with the loss of the reference, and show how far two such runs
differ anyway: `lr` has a learning rate 0.1 % higher, `rounding` sums gradients in another order (two micro-batches an
update). A difference that is not well above theirs says nothing about the states.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sltrain_dist.config.load import load_config
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError, ExitCode, SltrainError
from sltrain_dist.streams import replace_unprintable
from sltrain_dist.train.run import pretrain

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "compare_states.yaml"
REFERENCE = "32"
CONTROLS = ("lr", "rounding")

Losses = dict[tuple[str, int], tuple[float, float]]
"""Validation losses before the first and after the last update, in nats per token, by variant and seed."""


def overrides_of(variant: str, config: Config) -> list[str]:
    """Returns the overrides of a variant, which is the name of a control or a number of bits."""
    if variant == "lr":
        return [f"optim.state_bits={REFERENCE}", f"optim.lr={config.optim.lr * 1.001!r}"]
    if variant == "rounding":
        if config.train.micro_batch % 2:
            raise ConfigError(f"--controls rounding needs an even train.micro_batch, not {config.train.micro_batch}")
        return [f"optim.state_bits={REFERENCE}", f"train.micro_batch={config.train.micro_batch // 2}"]
    return [f"optim.state_bits={variant}"]


def run_name(variant: str, seed: int, config: Config) -> str:
    """Returns the name of a run's directory, which is unique to its settings."""
    settings = config.model_dump_json(exclude={"run_dir", "tracking"})
    return f"{variant}-{seed}-{sha256(settings.encode()).hexdigest()[:8]}"


def losses_of(config: str, overrides: Sequence[str], run_dir: Path) -> tuple[float, float]:
    """Makes or resumes a run and returns its first and last validation loss; raises SystemExit if the run fails."""
    with redirect_stdout(sys.stderr):  # standard output is for the result
        code = pretrain(config, [*overrides, f"run_dir={run_dir}", "tracking.mlflow=false"])
    if code != ExitCode.DONE:
        raise SystemExit(int(code))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [float(line["eval_loss"]) for line in lines if "eval_loss" in line]
    return found[0], found[-1]


def differences(losses: Losses) -> dict[str, list[float]]:
    """Returns the last losses minus those of the same seed with 32-bit states, by variant."""
    found: dict[str, list[float]] = {}
    for (variant, seed), (_, loss) in losses.items():
        if variant != REFERENCE:
            found.setdefault(variant, []).append(loss - losses[REFERENCE, seed][1])
    return found


def make_table(losses: Losses) -> Table:
    """Makes a table of the differences, with the first and last loss of the reference in its title."""
    before, after = zip(*(pair for (variant, _), pair in losses.items() if variant == REFERENCE), strict=True)
    title = f"Validation loss minus that of {REFERENCE}-bit states ({statistics.fmean(before):.3f} before, "
    table = Table(title=f"{title}{statistics.fmean(after):.3f} after), nats", box=SIMPLE_HEAD)
    for heading in ("states", "mean", "min", "max", "seeds"):
        table.add_column(heading, justify="left" if heading == "states" else "right", no_wrap=True)
    for variant, found in differences(losses).items():
        name = f"{REFERENCE} bits, {variant} (control)" if variant in CONTROLS else f"{variant} bits"
        numbers = (statistics.fmean(found), min(found), max(found))
        table.add_row(name, *(f"{number:+.4f}" for number in numbers), str(len(found)))
    return table


def report(losses: Losses, config: Config) -> dict[str, Any]:
    """Returns the JSON report."""
    settings = config.model_dump(include={"model", "reparam", "data", "optim", "train", "eval"}, exclude_defaults=True)
    runs = [
        {"states": variant, "seed": seed, "eval_loss_before": before, "eval_loss": after}
        for (variant, seed), (before, after) in losses.items()
    ]
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    return environment | {"settings": settings, "runs": runs, "differences": differences(losses)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG), help="default: configs/compare_states.yaml")
    parser.add_argument("--bits", nargs="+", default=["8", "4"], choices=("16", "8", "4"))
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS), choices=CONTROLS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="directory of the runs, which are resumed; default: a temporary one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs, seed by seed, and prints the table or JSON; returns the exit code."""
    replace_unprintable()
    args = parse(arguments)
    variants = list(dict.fromkeys([REFERENCE, *args.controls, *args.bits]))
    losses: Losses = {}
    runs: dict[tuple[str, int], tuple[list[str], str]] = {}
    try:
        config = load_config(args.config, args.overrides)
        for seed, variant in itertools.product(args.seeds, variants):
            overrides = [*args.overrides, *overrides_of(variant, config), f"seed={seed}"]
            runs[variant, seed] = overrides, run_name(variant, seed, load_config(args.config, overrides))
    except SltrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    with tempfile.TemporaryDirectory() as temporary:
        for key, (overrides, name) in runs.items():
            losses[key] = losses_of(args.config, overrides, (args.out or Path(temporary)) / name)
    if args.json:
        print(json.dumps(report(losses, config)))
    else:
        Console().print(make_table(losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
