"""The `sltrain curve` command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from sltrain_dist.config.paths import path_option


def curve(
    runs: Annotated[list[Path], typer.Argument(parser=path_option("RUN"), metavar="RUN…", help="Run directories.")],
    metric: Annotated[
        str, typer.Option(help="What to show: a key of metrics.jsonl, such as eval_loss or tokens_per_s.")
    ] = "loss",
    by: Annotated[
        Literal["step", "tokens", "elapsed_s"],
        typer.Option(help="What to show it by.", metavar="step|tokens|elapsed_s"),
    ] = "tokens",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=path_option("--output"), metavar="FILE", help="PNG file to write."),
    ] = None,
) -> None:
    """Draws a metric of runs: in the terminal, or as a picture.

    Works on runs that are in progress, and needs no tracking server.
    """
    from sltrain_dist.files import write_whole, writing
    from sltrain_dist.tracking.curves import draw_picture, draw_text, read_curve

    curves = [read_curve(run, metric, by) for run in runs]
    if output is None:
        size = shutil.get_terminal_size((100, 30))
        typer.echo(draw_text(curves, metric, by, min(size.columns, 160), min(size.lines - 2, 40)))
        return
    with writing(f"--output {output}"):
        write_whole(output, draw_picture(curves, metric, by))
    typer.echo(f"written: {output}")
