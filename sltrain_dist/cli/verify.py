"""The `sltrain verify` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sltrain_dist.config.paths import path_option
from sltrain_dist.config.run_files import CHECKPOINTS
from sltrain_dist.errors import CheckpointError, DataError
from sltrain_dist.tracking.progress import progress_bar


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            parser=path_option("PATH"), help="A checkpoint, a run directory (all its checkpoints), or token shards."
        ),
    ],
) -> None:
    """Compares files with the sizes and SHA-256 hashes in their manifests.

    The exit code is 5 if a checkpoint is damaged, and 3 if token shards are.
    """
    from sltrain_dist.checkpoint.contents import damage
    from sltrain_dist.checkpoint.manifest import list_directories
    from sltrain_dist.data.sources.token_shards import is_prepared

    if is_prepared(path):
        _verify_tokens(path)
        return
    found = [kept for _, kept in list_directories(path / CHECKPOINTS)] or [path]
    damaged = []
    for checkpoint in found:  # not in a table, which would truncate paths on a narrow terminal
        problem = damage(checkpoint)
        typer.echo(f"{checkpoint.name}: {problem or 'intact'}")
        if problem is not None:
            damaged.append(checkpoint.name)
    if damaged:
        raise CheckpointError(f"damaged: {', '.join(damaged)}")


def _verify_tokens(path: Path) -> None:
    from sltrain_dist.data.sources.token_shards import damage, open_manifest

    manifest = open_manifest(path)
    problems: list[str] = []
    with progress_bar("verifying", len(manifest.shards)) as report:
        for number, shard in enumerate(manifest.shards, start=1):
            problems += filter(None, [damage(path, shard)])
            report(number, shard.name)
    if problems:
        raise DataError(
            f"damaged: {'; '.join(problems)}; to make them again, repeat their `sltrain prepare-tokens` command"
        )
    typer.echo(f"{path}: intact")
