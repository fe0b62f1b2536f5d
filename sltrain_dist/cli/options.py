"""Options that several commands share, and the printing of their results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sltrain_dist.config.paths import path_option

InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        parser=path_option("--input", str),
        metavar="PATH",
        help="File, directory, glob (quote it), URL or Hub dataset; may be repeated. Text files and JSON lines (also "
        ".gz, .bz2, .xz, .zst), Parquet, Arrow.",
    ),
]
CheckpointArgument = Annotated[
    Path,
    typer.Argument(parser=path_option("CHECKPOINT"), help="A checkpoint, or a run directory (its newest checkpoint)."),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", parser=path_option("--output"), metavar="PATH", help="Directory to create.")
]
TextFieldOption = Annotated[str, typer.Option(help="Key of the text in JSON lines, or column of a table.")]
EncodingOption = Annotated[
    str | None,
    typer.Option(
        help="Encoding of text files and JSON lines, such as latin-1, cp1252 or utf-16-le. Default: UTF-8, or UTF-16 "
        "or UTF-32 if a file begins with their byte order mark."
    ),
]
MaxDocumentBytesOption = Annotated[
    int, typer.Option(min=1, help="Largest size of a document in bytes, as data.max_document_bytes in training.")
]


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Prints a title and its rows as plain lines, which a narrow terminal wraps instead of truncating them."""
    width = max(map(len, rows), default=0)
    print(title)
    for key, value in rows.items():
        print(f"  {key:<{width}}  {value}")
