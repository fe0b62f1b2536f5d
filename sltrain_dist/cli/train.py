"""The `sltrain train` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sltrain_dist.config.paths import path_option


def train(
    config: Annotated[
        Path, typer.Option(parser=path_option("--config"), metavar="FILE", help="YAML file: what to train, and how.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Values that override the file's.")
    ] = None,
    print_run_dir: Annotated[bool, typer.Option("--print-run-dir", help="Only print where exit.json will be.")] = False,
) -> None:
    """Pretrains a model, as launch/pretrain.py does.

    One process: sltrain train --config FILE. Several: torchrun --nproc-per-node N -m sltrain_dist train --config FILE,
    and likewise deepspeed --module sltrain_dist, or srun python -m sltrain_dist.

    Exit codes: 0 done, 1 a crash or another process lost, 2 configuration, 3 data, 4 diverged, 5 checkpoint, 6 storage,
    75 stopped early with everything saved. Launchers lose them, so exit.json in the run directory has them too.
    """
    from sltrain_dist.train import run

    start = run.print_run_dir if print_run_dir else run.pretrain
    raise typer.Exit(int(start(str(config), overrides or [])))
