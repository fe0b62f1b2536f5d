"""The choice of the files of a directory that make up a split."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sltrain_dist.data.sources.kinds import (
    DOCUMENTS,
    MANIFEST,
    Kind,
    base_name,
    is_held_out,
    is_metadata,
    is_of_split,
    is_training,
    kind_of,
    printable,
)
from sltrain_dist.errors import DataError

Report = Callable[[str], object]
"""Receives one line for the user at a time."""


def corpus_files(directory: Path, split: str, report: Report = lambda line: None) -> list[str] | None:
    """Returns the shards of a split in a directory made by `sltrain prepare-text`; None if it is not such a directory.

    Args:
        directory: The directory.
        split: Name of the split.
        report: Told which other documents are left out.

    Raises:
        DataError: There is no such split, or a shard is missing or has a wrong size.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not manifest["tool"].startswith("sltrain_dist"):
            return None
        name, sizes, splits = manifest["name"], dict(manifest["files"]), list(manifest["splits"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    files = [file for file in sizes if file.startswith(f"{name}-{split}.")]
    if not files:
        raise DataError(f"the corpus in {directory} has no split {split!r}; it has {splits}")
    for file in files:
        path = directory / file
        actual = path.stat().st_size if path.is_file() else None
        if actual != sizes[file]:
            found = "is missing" if actual is None else f"has {actual:,} bytes instead of {sizes[file]:,}"
            raise DataError(f"{path} {found}; copy it again, or rebuild the corpus with `sltrain prepare-text`")
    others = {child.name for child in directory.iterdir() if _is_wanted(child.name, with_text=False)} - set(sizes)
    if others:
        report(f"{printable(str(directory))}: left out {_listed(others)}, not in {MANIFEST}; include them by a glob")
    return [str((directory / file).absolute()) for file in files]


def document_files(files: Sequence[str], directory: str, split: str, report: Report, *, with_text: bool) -> list[str]:
    """Returns the files of a directory that hold documents of a split, without hidden files, metadata, other formats.

    A training split is all files whose names do not mark them as held out. Another split is the files whose names
    contain it, else the held-out files, else all files, as in a directory that holds only this split.

    Args:
        files: Paths or URLs of the files in the directory.
        directory: The directory, for messages.
        split: Name of the split.
        report: Told which files are left out because they belong to another split.
        with_text: Whether plain text counts too.

    Raises:
        DataError: There are no such files.
    """
    documents = [file for file in files if _is_wanted(file, with_text=with_text)]
    if not documents:
        raise DataError(_no_documents_message(files, directory))
    held_out = [file for file in documents if is_held_out(file)]
    if is_training(split):
        chosen = [file for file in documents if file not in set(held_out)]
    else:
        chosen = [file for file in documents if is_of_split(file, split)] or held_out or documents
    if not chosen:
        raise DataError(
            f"all documents in the directory {directory!r} are held-out data, judging by names such as "
            f"{base_name(held_out[0])}; to use them for split {split!r} anyway, name them with a glob"
        )
    if other := {base_name(file) for file in set(documents) - set(chosen)}:
        report(
            f"{printable(directory)}: left out {_listed(other)}, by name not of split {split!r}; include them by a glob"
        )
    return chosen


def matching_files(files: Sequence[str], pattern: str, split: str, report: Report) -> list[str]:
    """Returns the files that match a glob, without hidden files and metadata.

    Args:
        files: Paths or URLs that match.
        pattern: The glob, for messages.
        split: The split that the glob is used for.
        report: Told if some, but not all, files of a training split are held out by name.
    """
    found = [file for file in files if not is_metadata(file)]
    held_out = [file for file in found if is_held_out(file)]
    if is_training(split) and 0 < len(held_out) < len(found):
        example = printable(base_name(held_out[0]))
        report(f"training on held-out data, judging by its name: {printable(pattern)} matches {example}")
    return found


def _listed(names: Collection[str]) -> str:
    """Returns the number of files and the first three names, for messages."""
    shown = printable(", ".join(sorted(names)[:3])) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {'file' if len(names) == 1 else 'files'} ({shown})"


def _is_wanted(file: str, *, with_text: bool) -> bool:
    kind = kind_of(file)
    return not is_metadata(file) and (kind in DOCUMENTS or (with_text and kind is Kind.PLAIN_TEXT))


def _no_documents_message(files: Sequence[str], directory: str) -> str:
    place = directory.rstrip("/")
    message = (
        f"the directory {directory!r} holds no *.json, *.jsonl, *.ndjson (also .gz, .bz2, .xz, .zst), *.parquet or "
        f"*.arrow file of documents among its {len(files)} files"
    )
    message = f"{message}; subdirectories need a glob such as '{place}/**/*.json.gz'"
    if any(kind_of(file) is Kind.PLAIN_TEXT for file in files):
        message = f"{message}; plain text needs `sltrain prepare-text --input {place} --output DIR`"
    return message
