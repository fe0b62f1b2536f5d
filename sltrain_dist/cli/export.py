"""The `sltrain export` command."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from sltrain_dist.cli.options import CheckpointArgument, OutputOption, print_table
from sltrain_dist.tracking.progress import status_line


class Dtype(StrEnum):
    """Type of weights."""

    bf16 = "bf16"
    fp32 = "fp32"


def export(
    checkpoint: CheckpointArgument,
    output: OutputOption,
    dtype: Annotated[Dtype, typer.Option(help="Type of the exported weights.")] = Dtype.bf16,
) -> None:
    """Exports a checkpoint as a dense Hugging Face LLaMA (safetensors), with sparse and low-rank parts merged."""
    from sltrain_dist.hub.export import export_dense

    with status_line() as report:
        report(f"merging {checkpoint}")
        parameters = export_dense(checkpoint, output, dtype=dtype.value)
    print_table(f"Model in {output}", {"parameters": f"{parameters:,}", "type": dtype.value})
