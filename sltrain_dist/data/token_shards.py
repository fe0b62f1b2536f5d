"""Prepared data: the token ids of every document of a text source, in files that are mapped into memory.

A directory made by `sltrain prepare-data --tokenizer` holds two files for each shard of the source::

    00000.tokens   token ids of all documents, each followed by eos; uint16, or uint32 for larger vocabularies
    00000.index    int64 (documents + 1,): where in the tokens each document begins; then uint8 (documents,): 0, or
                   1 + the number of the cause (of the manifest's `causes`) for which the document cannot be used

both little-endian, and `token_shards.json`, the manifest. An unusable document keeps its place, with no tokens, so
that a position means the same document as in the text.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sltrain_dist.data.documents import Encoder, Fault
from sltrain_dist.data.files.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.errors import ConfigError, DataError

MANIFEST = "token_shards.json"
TEMPORARY = ".tmp"
"""Suffix of files that are being written."""
_FORMAT = 1
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenJob:
    """What token shards are made of and how: equal for equal content."""

    sources: tuple[tuple[str, int], ...]
    """Path or URL, and size in bytes, of each shard of the text source, in order; 0 where it is not known."""
    text_field: str
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    eos_id: int
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Documents of more bytes are unusable."""
    contents: tuple[str, ...] = ()
    """What each shard of the text source holds, see :mod:`sltrain_dist.data.files.identity`. Empty where an earlier
    version made the token shards, which did not look."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored token ids."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class TokenShard:
    """What one shard of the source has become."""

    name: str
    """Name of its files, without suffix."""
    documents: int = 0
    """Unusable ones included."""
    tokens: int = 0
    """Stored ids, an eos for each usable document included."""
    faults: dict[str, int] = field(default_factory=dict)
    """Unusable documents by cause."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size in bytes and SHA-256 of each file."""


@dataclass(frozen=True)
class TokenManifest:
    """The manifest of a directory of token shards."""

    directory: str
    """Absolute path, not stored."""
    job: TokenJob
    causes: tuple[str, ...]
    """Values of :class:`Fault`, in the order of the numbers in the index files."""
    shards: tuple[TokenShard, ...]
    """One for each shard of the source; empty while the preparation is not finished."""

    def files(self, shard: int) -> list[str]:
        """Paths of a shard's files."""
        return [str(Path(self.directory) / f"{self.shards[shard].name}.{suffix}") for suffix in ("tokens", "index")]

    def all_files(self) -> list[str]:
        """Paths of all shards' files, in order."""
        return [path for number in range(len(self.shards)) for path in self.files(number)]

    @property
    def source_bytes(self) -> int:
        """Size of the text source, or 0 if a part of it is not known."""
        sizes = [size for _, size in self.job.sources]
        return sum(sizes) if all(sizes) else 0

    def to_json(self) -> str:
        """The manifest's file."""
        return (
            json.dumps(
                {
                    "format": _FORMAT,
                    "dtype": self.job.dtype.name,
                    "causes": self.causes,
                    "job": asdict(self.job),
                    "shards": [asdict(shard) for shard in self.shards],
                },
                indent=1,
            )
            + "\n"
        )


def is_prepared(directory: Path) -> bool:
    """Whether a directory holds token shards, finished or not."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> TokenManifest:
    """The manifest of a directory, of a preparation that is not finished too.

    Raises:
        DataError: It cannot be read.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise DataError(f"{path} is of format {values['format']}; this program reads format {_FORMAT}")
        job = values["job"]
        return TokenManifest(
            directory=str(directory.absolute()),
            job=TokenJob(
                **{
                    **job,
                    "sources": tuple((name, size) for name, size in job["sources"]),
                    "contents": tuple(job.get("contents", ())),
                }
            ),
            causes=tuple(values["causes"]),
            shards=tuple(map(shard_from_dict, values["shards"])),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the manifest {path} cannot be read: {type(error).__name__}: {error}") from None


def shard_from_dict(values: dict[str, Any]) -> TokenShard:
    """The inverse of `dataclasses.asdict`, after JSON."""
    return TokenShard(**{**values, "files": {name: (size, digest) for name, (size, digest) in values["files"].items()}})


def open_manifest(directory: Path) -> TokenManifest:
    """The manifest of a finished directory whose files have their sizes.

    Hashes are not compared: that would read all of the data at every start. See :func:`damage`.

    Raises:
        DataError: The preparation is not finished, or a file is missing or of another size.
    """
    manifest = read_manifest(directory)
    if not manifest.shards:
        raise DataError(_unfinished(directory))
    for shard in manifest.shards:
        if problem := damage(directory, shard, hashes=False):
            raise DataError(f"{problem}; run the same `sltrain prepare-data` again, which makes it anew")
    return manifest


def manifest_for(
    shards: Sequence[str], tokenizer: Encoder, text_field: str, max_document_bytes: int
) -> TokenManifest | None:
    """The manifest, if `shards` (see :func:`sltrain_dist.data.source.resolve_source`) are token shards; else None.

    Raises:
        ConfigError: They were made with another tokenizer, of another field, or with another limit of length.
        DataError: The preparation is not finished, or the manifest cannot be read.
    """
    if len(shards) != 1 or Path(shards[0]).name != MANIFEST:
        return None
    manifest = read_manifest(Path(shards[0]).parent)
    if not manifest.shards:
        raise DataError(_unfinished(manifest.directory))
    made_with = manifest.job
    if made_with.tokenizer != tokenizer.fingerprint:
        raise ConfigError(
            f"the token shards in {manifest.directory} were made with the tokenizer {made_with.tokenizer} "
            f"({made_with.vocab_size} pieces), but data.tokenizer is {tokenizer.fingerprint}; name the same model "
            "file, or prepare the text again"
        )
    if made_with.text_field != text_field:
        raise ConfigError(
            f"the token shards in {manifest.directory} were made of the field {made_with.text_field!r}; set "
            f"data.text_field={made_with.text_field}, or prepare the text again"
        )
    if made_with.max_document_bytes != max_document_bytes:
        raise ConfigError(
            f"the token shards in {manifest.directory} hold documents of up to {made_with.max_document_bytes} bytes; "
            f"set data.max_document_bytes={made_with.max_document_bytes}, or prepare the text again"
        )
    return manifest


def count_shards(shards: Sequence[str]) -> int:
    """Number of shards of a source, where it is token shards too (see `shards` of :func:`manifest_for`)."""
    if len(shards) == 1 and Path(shards[0]).name == MANIFEST:
        return len(read_manifest(Path(shards[0]).parent).job.sources)
    return len(shards)


def _unfinished(directory: Path | str) -> str:
    return (
        f"the preparation of {directory} is not finished; run the same `sltrain prepare-data` again, which goes on "
        "where it stopped"
    )


def damage(directory: Path, shard: TokenShard, *, hashes: bool = True) -> str | None:
    """What is wrong with a shard's files, or None.

    Args:
        directory: Where they are.
        shard: What they should be.
        hashes: Whether SHA-256 is compared too, and not only the size.
    """
    for name, (size, digest) in shard.files.items():
        path = directory / name
        try:
            actual = path.stat().st_size
            if actual != size:
                return f"{path} has {actual} bytes instead of {size}"
            if hashes and _sha256(path) != digest:
                return f"the content of {path} has changed: its SHA-256 is not that of the manifest"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
    return None


class ShardReader:
    """One token shard, mapped into memory.

    Args:
        manifest: The directory's manifest.
        number: Which of the shards.

    Attributes:
        tokens: Ids of all documents, shape (tokens,).
        starts: Where each document begins, shape (documents + 1,).

    Raises:
        DataError: A file is missing or of another size.
    """

    def __init__(self, manifest: TokenManifest, number: int) -> None:
        directory, shard = Path(manifest.directory), manifest.shards[number]
        if problem := damage(directory, shard, hashes=False):
            raise DataError(f"{problem}; run the same `sltrain prepare-data` again, which makes it anew")
        index = _map(directory / f"{shard.name}.index", np.dtype(np.uint8))
        split = 8 * (shard.documents + 1)
        self.tokens = _map(directory / f"{shard.name}.tokens", manifest.job.dtype)
        self.starts: npt.NDArray[np.int64] = index[:split].view("<i8")
        self._causes = index[split:]
        self._faults = [Fault(cause) for cause in manifest.causes]

    @property
    def documents(self) -> int:
        """Number of documents, unusable ones included."""
        return len(self._causes)

    def fault(self, document: int) -> Fault | None:
        """Why a document cannot be used; None if it can."""
        cause = int(self._causes[document])
        return self._faults[cause - 1] if cause else None


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # nothing cannot be mapped
    # A plain array over the map: slicing np.memmap itself takes ten times as long.
    return np.asarray(np.memmap(path, dtype, mode="r")).view(np.ndarray)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file that is either whole under its name or not there, also after a power cut."""
    temporary = temporary_for(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(temporary, path)


def temporary_for(path: Path) -> Path:
    """A name of its own for a file that is to become `path`: what an earlier command, killed a moment ago, has left
    running may still be writing to its."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a file that is safely on the disk, and makes the name as safe."""
    temporary.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
