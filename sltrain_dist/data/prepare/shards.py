"""Corpora on disk: C4-format shards (gzipped JSON lines) with a manifest, written atomically."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from sltrain_dist import __version__
from sltrain_dist.data.prepare.inputs import Document
from sltrain_dist.data.sources.kinds import MANIFEST
from sltrain_dist.errors import DataError
from sltrain_dist.files import failing_as

Split = Literal["train", "validation"]

_FORMAT = 1
_TIMESTAMP = "1970-01-01T00:00:00Z"
"""Value of C4's field for the crawl time: there was no crawl, and the current time would change the bytes."""


@dataclass
class SplitCounts:
    """Size of one split."""

    documents: int = 0
    text_bytes: int = 0
    """Size of the documents' text in UTF-8."""


@dataclass
class CorpusManifest:
    """Manifest of a corpus: its content and inputs."""

    name: str
    inputs: Any
    """Names and versions of packages, or names and sizes of files, that the documents come from."""
    fingerprint: str = ""
    """16 hexadecimal digits of SHA-256 over all lines, split by split, in order of the shards."""
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of documents by source and split."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of documents read but not written, by reason."""
    files: dict[str, int] = field(default_factory=dict)
    """Size of each shard, in bytes."""

    def to_json(self) -> str:
        """Returns the manifest as JSON text."""
        values = {"format": _FORMAT, "tool": f"sltrain_dist {__version__}", **vars(self)}
        values["splits"] = {split: vars(counts) for split, counts in self.splits.items()}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def write_corpus(
    directory: Path,
    documents: Iterable[tuple[Split, Document]],
    manifest: CorpusManifest,
    *,
    num_shards: int,
    dropped: Counter[str],
) -> CorpusManifest:
    """Writes `<name>-<split>.00000-of-00004.json.gz` and the manifest into an existing directory.

    Documents go to a split's shards in turn; few documents make fewer shards, so that none is empty.
    Validation is one shard. The same documents give the same bytes (with the same version of zlib).

    Args:
        directory: Directory to write to; see :func:`sltrain_dist.files.writing_directory`.
        documents: Documents with their splits, in order.
        manifest: Manifest with name and inputs; the other fields are filled in.
        num_shards: Number of shards of the training split.
        dropped: Counts of documents dropped by the producer of `documents`; read after the last document.

    Raises:
        DataError: The disk is full or the directory cannot be written.
    """
    writers: dict[Split, _SplitWriter] = {
        split: _SplitWriter(directory / f"{manifest.name}-{split}", num_shards if split == "train" else 1)
        for split in ("train", "validation")
    }
    with failing_as(f"cannot write to {directory.parent}", DataError):
        try:
            for split, document in documents:
                writers[split].write(document)
                counts = manifest.sources.setdefault(document.source, {})
                counts[split] = counts.get(split, 0) + 1
            digest = hashlib.sha256()
            for split, writer in writers.items():
                if writer.counts.documents:
                    manifest.splits[split] = writer.counts
                    manifest.files.update(writer.finish(digest))
            manifest.fingerprint = digest.hexdigest()[:16]
            manifest.sources = dict(sorted(manifest.sources.items()))
            manifest.dropped = dict(sorted(dropped.items()))
            (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        finally:
            for writer in writers.values():
                with suppress(OSError):  # reported above
                    writer.close()
    return manifest


def is_complete(directory: Path) -> bool:
    """Returns whether the directory has a manifest and all shards listed in it, with the right sizes."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest["format"] == _FORMAT and all(
            (directory / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


class _SplitWriter:
    """Writes documents to gzip files in turn. The files are named at the end, when their number is known."""

    def __init__(self, stem: Path, num_shards: int) -> None:
        self.counts = SplitCounts()
        self._stem, self._num_shards = stem, num_shards
        self._open: list[tuple[Path, IO[bytes], gzip.GzipFile, Any]] = []

    def write(self, document: Document) -> None:
        index = self.counts.documents % self._num_shards
        if index == len(self._open):
            path = Path(f"{self._stem}.{index:05d}")
            raw = path.open("wb")
            # No name and no time in the header, because they would differ between builds.
            self._open.append((path, raw, gzip.GzipFile("", "wb", 6, raw, mtime=0), hashlib.sha256()))
        row = {"text": document.text, "timestamp": _TIMESTAMP, "url": document.url}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        _, _, file, digest = self._open[index]
        file.write(line)
        digest.update(line)
        self.counts.documents += 1
        self.counts.text_bytes += len(document.text.encode())

    def finish(self, corpus_digest: Any) -> dict[str, int]:
        """Closes and names the shards; returns their sizes."""
        self.close()
        sizes = {}
        for unnamed, _, _, digest in self._open:
            path = unnamed.rename(f"{unnamed}-of-{len(self._open):05d}.json.gz")
            sizes[path.name] = path.stat().st_size
            corpus_digest.update(digest.digest())
        return sizes

    def close(self) -> None:
        for _, raw, file, _ in self._open:
            try:
                file.close()
            finally:
                raw.close()
