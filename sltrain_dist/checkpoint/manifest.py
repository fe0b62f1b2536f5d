"""What makes a directory a checkpoint: `manifest.json`, with size and SHA-256 of every file (stdlib only).

Layout of `<run_dir>/checkpoints/step_XXXXXXXX/`:

    tensors-00000-of-00002.safetensors   pieces of parameters and optimizer states, one file per rank
    state.json                           counters, data cursor, random-number states, fingerprints
    config.yaml                          the resolved configuration
    tokenizer.model                      the SentencePiece model that the run was trained with
    manifest.json                        written last; a directory without it is not a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from sltrain_dist.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of all complete checkpoints in `<run_dir>/checkpoints`, oldest first."""
    return [(step, path) for step, path in list_directories(directory) if (path / MANIFEST).is_file()]


def list_directories(directory: Path) -> list[tuple[int, Path]]:
    """As :func:`list_checkpoints`, with directories that only look like checkpoints: theirs went missing."""
    if not directory.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def file_entry(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(directory: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest of a directory whose other files are complete."""
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1, sort_keys=True)
    write_synced(directory / MANIFEST, text + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads and checks the manifest itself.

    Raises:
        CheckpointError: There is none, or it is damaged or of an unknown format.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        known = manifest["format"] == FORMAT and isinstance(manifest["files"], dict)
        int(manifest["step"])
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    if not known:
        raise CheckpointError(f"{path} has format {manifest['format']!r}; this version reads format {FORMAT}")
    return manifest


def damage(directory: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Compares the files with the manifest and says what is wrong, or returns None.

    Args:
        directory: The checkpoint.
        part: Which of the `parts` equal shares of the files to hash, so that ranks can share the reading.
        parts: Number of shares.
    """
    try:
        files = read_manifest(directory)["files"]
    except CheckpointError as error:
        return str(error)
    for name in sorted(files)[part::parts]:
        path = directory / name
        try:
            if path.stat().st_size != files[name]["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {files[name]['bytes']}"
            if file_entry(path) != files[name]:
                return f"{path} does not have the SHA-256 that the manifest names"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and waits until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
