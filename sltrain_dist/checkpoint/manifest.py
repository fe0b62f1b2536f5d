"""The manifest of a checkpoint: `manifest.json`, with size and SHA-256 of every file. Does not import torch.

Layout of `<run_dir>/checkpoints/step_XXXXXXXX/`:

    tensors-00000-of-00002.safetensors   ranges of parameters and optimizer states, one file per rank
    state.json                           counters, data cursor, random-number states, fingerprint of the supports
    config.yaml                          the resolved configuration
    tokenizer.model                      the SentencePiece model of the run
    manifest.json                        written last; a directory without it is not a checkpoint

Only files that the manifest lists are ever read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sltrain_dist.errors import CheckpointError
from sltrain_dist.files import FileName, NumBytes, SealedModel, Sha256, read_model, sha256_of, write_synced

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.model"
_NAME = re.compile(r"step_(\d{8,18})", re.ASCII)


class FileEntry(BaseModel):
    """Size and SHA-256 of a file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: NumBytes
    sha256: Sha256


class _Version(BaseModel):
    """The only field that is read from a manifest of another format."""

    format: int


class Manifest(SealedModel):
    """The content of `manifest.json`."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    step: Annotated[int, Field(ge=0, lt=1 << 63)]
    """Number of updates made."""
    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        num_tensors = max(1, len(self.tensor_files))
        expected = [STATE, CONFIG, *(tensor_file(rank, num_tensors) for rank in range(num_tensors))]
        for name in expected:
            if name not in self.files:
                raise ValueError(f"it does not list {name}")
        return self

    @property
    def tensor_files(self) -> list[str]:
        """Names of the tensor files, ordered by rank."""
        return sorted(name for name in self.files if name.startswith("tensors-"))


def tensor_file(rank: int, world_size: int) -> str:
    """Returns the name of the tensor file of a rank."""
    return f"tensors-{rank:05d}-of-{world_size:05d}.safetensors"


def checkpoint_name(step: int) -> str:
    """Returns the directory name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Returns (step, path) of all complete checkpoints in `<run_dir>/checkpoints`, oldest first."""
    return [(step, path) for step, path in list_directories(directory) if (path / MANIFEST).is_file()]


def list_directories(directory: Path) -> list[tuple[int, Path]]:
    """Lists checkpoints as :func:`list_checkpoints` does, but includes directories whose manifest is missing.

    Raises:
        CheckpointError: The directory exists but cannot be read.
    """
    if not directory.is_dir():
        return []
    try:
        matches = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror or error}") from None
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def file_entry(path: Path) -> FileEntry:
    """Computes the size and SHA-256 of a file.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))


def write_manifest(directory: Path, step: int, files: Mapping[str, FileEntry]) -> None:
    """Writes the manifest, after all other files of the checkpoint are complete."""
    write_synced(directory / MANIFEST, Manifest(format=FORMAT, step=step, files=dict(files)).sealed())


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks a manifest, but not the files that it lists.

    Raises:
        CheckpointError: It is missing, damaged, of an unknown format, or of another step than its directory.
    """
    path = directory / MANIFEST
    try:
        found = read_model(path, _Version).format
        if found != FORMAT:
            raise CheckpointError(f"{path} has format {found}; this version reads format {FORMAT}")
        manifest = read_model(path, Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if (match := _NAME.fullmatch(directory.name)) and int(match.group(1)) != manifest.step:
        raise CheckpointError(f"{path} is damaged: it is of step {manifest.step}, unlike its directory")
    return manifest


def changed_file(directory: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Compares the files of a checkpoint with its manifest; returns a description of the first problem, or None.

    Args:
        directory: The checkpoint.
        part: Index of the share of the files to check, so that ranks can divide the work.
        parts: Number of shares.
    """
    try:
        files = read_manifest(directory).files
    except CheckpointError as error:
        return str(error)
    for name in sorted(files)[part::parts]:
        path = directory / name
        try:
            size = path.stat().st_size
            if size != files[name].bytes:
                return f"{path} has {size} bytes instead of {files[name].bytes}"
            if sha256_of(path) != files[name].sha256:
                return f"{path} does not have the SHA-256 of the manifest"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
    return None
