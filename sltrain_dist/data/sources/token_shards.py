"""Token shards: the token ids of every document of a text source, in memory-mapped files.

A directory made by `sltrain prepare-tokens` holds two files for each shard of the source::

    00000.tokens   token ids of all documents, each followed by eos; uint16, or uint32 for larger vocabularies
    00000.index    int64 (documents + 1,): offset of each document in the tokens; then uint8 (documents,): 0, or for an
                   unusable document 1 + the index of its cause in the manifest's `causes`

both little-endian, and `token_shards.json`, the manifest. An unusable document keeps its place, with no tokens, so
that a position means the same document as in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, RootModel, model_validator

from sltrain_dist.data.documents import Encoder, Fault
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.errors import ConfigError, DataError
from sltrain_dist.files import FileName, NumBytes, SealedModel, Sha256, read_model, sha256_of, write_whole

MANIFEST = "token_shards.json"
_FORMAT = 1
_STRICT = ConfigDict(extra="forbid", strict=True)
_Count = Annotated[int, Field(ge=0, lt=1 << 48)]


@dataclass(frozen=True)
class TokenJob:
    """Input and settings of token shards: equal jobs give equal content."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    sources: tuple[tuple[str, _Count], ...]
    """Path or URL and size in bytes of each shard of the text source, in order; size 0 if unknown."""
    text_field: str
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: Annotated[int, Field(gt=0, lt=1 << 32)]
    eos_id: _Count
    max_document_bytes: _Count = MAX_DOCUMENT_BYTES
    """Longer documents are unusable."""
    contents: tuple[str, ...] = ()
    """Content hash of each shard of the text source, see :mod:`sltrain_dist.data.sources.identity`. Empty in token
    shards of versions that did not record it."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the stored token ids."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class TokenShard:
    """Description of one token shard."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: FileName
    """Name of the shard's files, without suffix."""
    documents: _Count = 0
    """Number of documents, unusable ones included."""
    tokens: _Count = 0
    """Number of stored ids, including one eos per usable document."""
    faults: dict[str, _Count] = field(default_factory=dict)
    """Number of unusable documents by cause."""
    files: dict[FileName, tuple[NumBytes, Sha256]] = field(default_factory=dict)
    """Size in bytes and SHA-256 of each file."""


@dataclass(frozen=True)
class TokenManifest:
    """The manifest of a directory of token shards."""

    directory: str
    """Absolute path of the directory; not stored in the file."""
    job: TokenJob
    causes: tuple[str, ...]
    """Values of :class:`Fault`, in the order of the numbers in the index files."""
    shards: tuple[TokenShard, ...]
    """One per shard of the source; empty until the preparation is finished."""

    def files(self, shard: int) -> list[str]:
        """Returns the paths of a shard's files."""
        return [str(Path(self.directory) / f"{self.shards[shard].name}.{suffix}") for suffix in ("tokens", "index")]

    def all_files(self) -> list[str]:
        """Returns the paths of all shards' files, in order."""
        return [path for number in range(len(self.shards)) for path in self.files(number)]

    @property
    def source_bytes(self) -> int:
        """Size of the text source in bytes, or 0 if the size of any shard is unknown."""
        sizes = [size for _, size in self.job.sources]
        return sum(sizes) if all(sizes) else 0

    def to_json(self) -> str:
        """Returns the manifest as JSON text."""
        return _Stored(
            format=_FORMAT, dtype=self.job.dtype.name, causes=self.causes, job=self.job, shards=self.shards
        ).sealed()


class _Stored(SealedModel):
    """Schema of the manifest's file."""

    format: int
    dtype: str
    causes: tuple[str, ...]
    job: TokenJob
    shards: tuple[TokenShard, ...]

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.format != _FORMAT:
            raise ValueError(f"it has format {self.format}; this program reads format {_FORMAT}")
        if self.dtype != self.job.dtype.name:
            raise ValueError(f"it has ids of type {self.dtype} for {self.job.vocab_size} pieces")
        for cause in self.causes:
            Fault(cause)
        if self.shards and len(self.shards) != len(self.job.sources):
            raise ValueError(f"it lists {len(self.shards)} shards for {len(self.job.sources)} sources")
        for shard in self.shards:
            _check_sizes(shard, self.job)
        return self


class _Record(RootModel[TokenShard]):
    """Schema of the file that records a finished shard until the whole preparation is finished."""


def is_prepared(directory: Path) -> bool:
    """Returns whether a directory holds token shards, finished or not."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> TokenManifest:
    """Returns the manifest of a directory, even if the preparation is not finished.

    Raises:
        DataError: The manifest cannot be read.
    """
    path = directory / MANIFEST
    try:
        stored = read_model(path, _Stored)
    except (OSError, ValueError) as error:
        raise DataError(f"the manifest {path} cannot be read: {error}") from None
    return TokenManifest(str(directory.absolute()), stored.job, stored.causes, stored.shards)


def _check_sizes(shard: TokenShard, job: TokenJob) -> None:
    sizes = {
        f"{shard.name}.tokens": job.dtype.itemsize * shard.tokens,
        f"{shard.name}.index": 8 * (shard.documents + 1) + shard.documents,
    }
    if {name: size for name, (size, _) in shard.files.items()} != sizes:
        raise ValueError(f"the file sizes of shard {shard.name} do not match its numbers of tokens and documents")


def read_record(path: Path, job: TokenJob) -> TokenShard | None:
    """Reads the record of a shard that an unfinished preparation has made; None if it is damaged: make the shard again.

    Args:
        path: The shard's record.
        job: Input and settings of the preparation.
    """
    try:
        shard = read_model(path, _Record).root
        _check_sizes(shard, job)
    except (OSError, ValueError):
        return None
    return shard


def write_record(path: Path, shard: TokenShard) -> None:
    """Writes the record of a finished shard, see :func:`read_record`."""
    write_whole(path, _Record(shard).model_dump_json())


def open_manifest(directory: Path) -> TokenManifest:
    """Returns the manifest of a finished directory, after checking the sizes of its files.

    Hashes are not compared: that would read all data at every start. See :func:`damage`.

    Raises:
        DataError: The preparation is not finished, or a file is missing or has a wrong size.
    """
    manifest = read_manifest(directory)
    if not manifest.shards:
        raise DataError(_unfinished(directory))
    for shard in manifest.shards:
        if problem := damage(directory, shard, hashes=False):
            raise DataError(f"{problem}; run the same `sltrain prepare-tokens` again to rebuild it")
    return manifest


def manifest_for(
    shards: Sequence[str], tokenizer: Encoder, text_field: str, max_document_bytes: int
) -> TokenManifest | None:
    """Returns the manifest if `shards` are token shards, else None. See sources/resolve.py.

    Raises:
        ConfigError: They were made with another tokenizer, text field or limit of length.
        DataError: The preparation is not finished, or the manifest cannot be read.
    """
    if len(shards) != 1 or Path(shards[0]).name != MANIFEST:
        return None
    manifest = read_manifest(Path(shards[0]).parent)
    if not manifest.shards:
        raise DataError(_unfinished(manifest.directory))
    job = manifest.job
    if job.tokenizer != tokenizer.fingerprint:
        raise ConfigError(
            f"the token shards in {manifest.directory} were made with the tokenizer {job.tokenizer} "
            f"({job.vocab_size} pieces), but data.tokenizer is {tokenizer.fingerprint}; set data.tokenizer to the same "
            "model file, or prepare the text again"
        )
    if job.text_field != text_field:
        raise ConfigError(
            f"the token shards in {manifest.directory} were made from the field {job.text_field!r}; set "
            f"data.text_field={job.text_field}, or prepare the text again"
        )
    if job.max_document_bytes != max_document_bytes:
        raise ConfigError(
            f"the token shards in {manifest.directory} hold documents of up to {job.max_document_bytes} bytes; "
            f"set data.max_document_bytes={job.max_document_bytes}, or prepare the text again"
        )
    return manifest


def count_shards(shards: Sequence[str]) -> int:
    """Returns the number of text shards of a source, which may be token shards (see :func:`manifest_for`)."""
    if len(shards) == 1 and Path(shards[0]).name == MANIFEST:
        return len(read_manifest(Path(shards[0]).parent).job.sources)
    return len(shards)


def _unfinished(directory: Path | str) -> str:
    return f"the preparation of {directory} is not finished; run the same `sltrain prepare-tokens` again to resume it"


def damage(directory: Path, shard: TokenShard, *, hashes: bool = True) -> str | None:
    """Returns what is wrong with a shard's files, or None.

    Args:
        directory: Directory of the files.
        shard: Expected sizes and hashes.
        hashes: Whether to compare SHA-256 as well as the size.
    """
    for name, (size, digest) in shard.files.items():
        path = directory / name
        try:
            actual = path.stat().st_size
            if actual != size:
                return f"{path} has {actual} bytes instead of {size}"
            if hashes and sha256_of(path) != digest:
                return f"the content of {path} has changed: its SHA-256 differs from the manifest"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
    return None


class ShardReader:
    """One token shard, mapped into memory.

    Args:
        manifest: The directory's manifest.
        number: Index of the shard.

    Attributes:
        tokens: Ids of all documents, shape (tokens,).
        starts: Offset of each document in `tokens`, and the end of the last, shape (documents + 1,).

    Raises:
        DataError: A file is missing or has a wrong size.
    """

    def __init__(self, manifest: TokenManifest, number: int) -> None:
        directory, shard = Path(manifest.directory), manifest.shards[number]
        if problem := damage(directory, shard, hashes=False):
            raise DataError(f"{problem}; run the same `sltrain prepare-tokens` again to rebuild it")
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
        """Returns why a document cannot be used; None if it can."""
        cause = int(self._causes[document])
        return self._faults[cause - 1] if cause else None


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    # A plain array over the map: slicing np.memmap itself takes ten times as long.
    return np.asarray(np.memmap(path, dtype, mode="r")).view(np.ndarray)
