"""Preparation of token shards from shards of text: parallel, restartable, with atomic files."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from sltrain_dist.data.documents import SAMPLE, Fault, Tally, encode_documents
from sltrain_dist.data.sources.identity import UNKNOWN, FileIdentity, identify
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.data.sources.opening import num_bytes
from sltrain_dist.data.sources.resolve import read_documents
from sltrain_dist.data.sources.retry import Fetcher
from sltrain_dist.data.sources.token_shards import (
    MANIFEST,
    TokenJob,
    TokenManifest,
    TokenShard,
    damage,
    is_prepared,
    read_manifest,
    read_record,
    write_record,
)
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.errors import ConfigError, DataError
from sltrain_dist.files import TEMPORARY, failing_as, lock, write_whole, writing_whole

_CAUSES = tuple(fault.value for fault in Fault)
_LOCK = ".lock"
_PARENT_CHECK_S = 1.0

Report = Callable[[int, TokenShard], None]
"""Called with the number of finished shards, and the shard that has just been finished or found finished."""


@dataclass(frozen=True)
class _Task:
    """Arguments of a process that makes one shard."""

    directory: Path
    number: int
    tokenizer_path: Path
    job: TokenJob
    expected: FileIdentity | None = None
    """Identity of the text file when the preparation began, if it is local."""

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def prepare_tokens(
    shards: list[str],
    output: Path,
    tokenizer_path: Path,
    *,
    text_field: str = "text",
    max_bad_fraction: float = 0.01,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    processes: int = 1,
    report: Report | None = None,
) -> TokenManifest:
    """Tokenizes text into a directory of token shards, one for each shard of the text.

    Shards finished by an interrupted call with the same arguments are checked (SHA-256) and kept; damaged shards
    are rebuilt, also in a finished directory.

    Args:
        shards: Text shards from :func:`sltrain_dist.data.sources.resolve.resolve_source`.
        output: Directory to make, or to resume.
        tokenizer_path: The SentencePiece model file.
        text_field: Key of the text in each JSON line.
        max_bad_fraction: Largest accepted share of unusable documents.
        max_document_bytes: Longer documents are unusable.
        processes: Number of processes, each of which makes one shard at a time. 1: this process does it.
        report: Called for each finished shard.

    Raises:
        ConfigError: `output` has other content, or another process is writing to it.
        DataError: A shard cannot be read, too many documents are unusable, or the directory cannot be written.
    """
    if any(Path(shard).name == MANIFEST for shard in shards):
        raise ConfigError(f"{shards[0]} already belongs to token shards; give the text that they were made from")
    tokenizer = Tokenizer(tokenizer_path)
    sources = tuple((shard, _size(shard)) for shard in shards)
    files = identify(shards)
    job = TokenJob(
        sources,
        text_field,
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        max_document_bytes,
        tuple(files[shard].content if shard in files else UNKNOWN for shard in shards),
    )
    tasks = [_Task(output, number, tokenizer_path, job, files.get(shard)) for number, shard in enumerate(shards)]
    with failing_as(f"cannot write to {output} (finished shards are kept)", DataError), _locked_directory(output):
        finished = _find_finished(output, job)
        limit = _BadDocumentLimit(job, max_bad_fraction)
        missing = [task for task in tasks if task.number not in finished]
        for count, (number, shard) in enumerate(_make(missing, finished, processes), start=1):
            finished[number] = shard
            limit.add(shard)
            if report is not None:
                report(count, shard)
        limit.check(at_end=True)
        manifest = TokenManifest(str(output.absolute()), job, _CAUSES, tuple(finished[t.number] for t in tasks))
        write_whole(output / MANIFEST, manifest.to_json())
        for task in tasks:
            _record(task).unlink(missing_ok=True)
        return manifest


def _size(shard: str) -> int:
    """Returns the size of a shard in bytes; 0 if the server does not report it."""
    try:
        return Fetcher().call(shard, lambda: num_bytes(shard)) or 0
    except Exception as error:  # plug-ins of file systems raise exceptions of any type
        raise DataError(f"cannot get the size of {shard}: {type(error).__name__}: {error}") from error


class _BadDocumentLimit:
    """Stops the preparation when too many documents are unusable."""

    def __init__(self, job: TokenJob, limit: float) -> None:
        self._job = job
        self._limit = limit
        self._tally = Tally()

    def add(self, shard: TokenShard) -> None:
        """Counts one shard's documents."""
        self._tally.documents += shard.documents
        self._tally.faults.update({Fault(cause): count for cause, count in shard.faults.items()})
        self.check()

    def check(self, *, at_end: bool = False) -> None:
        """Raises DataError if too many documents are unusable, as soon as enough have been counted to tell."""
        if (at_end or self._tally.documents >= SAMPLE) and self._tally.exceeds(self._limit):
            raise self._tally.error("the text", self._limit, self._job.text_field)


def _find_finished(output: Path, job: TokenJob) -> dict[int, TokenShard]:
    """Returns the finished, undamaged shards by number; writes the manifest of an unfinished preparation."""
    for left_over in output.glob(f".*{TEMPORARY}"):
        left_over.unlink(missing_ok=True)
    records: list[TokenShard] = []
    if is_prepared(output):
        earlier = read_manifest(output)
        same_job = earlier.job == (job if earlier.job.contents else replace(job, contents=()))
        if not same_job or earlier.causes != _CAUSES[: len(earlier.causes)]:
            raise ConfigError(
                f"{output} holds token shards made from other text or with another text field, length limit or "
                "tokenizer; choose another directory or remove it"
            )
        records = list(earlier.shards)
    elif any(not path.name.startswith(".") for path in output.iterdir()):
        raise ConfigError(f"{output} already exists and holds no token shards; choose another directory or remove it")
    records += filter(None, (read_record(path, job) for path in output.glob("*.shard.json")))
    numbers = {f"{number:05d}": number for number in range(len(job.sources))}
    intact = {numbers[each.name]: each for each in records if each.name in numbers and damage(output, each) is None}
    if len(intact) < len(job.sources):
        # The new manifest marks the directory as unfinished, so each intact shard needs its own record first.
        for number, shard in intact.items():
            write_record(output / f"{number:05d}.shard.json", shard)
        write_whole(output / MANIFEST, TokenManifest(str(output), job, _CAUSES, ()).to_json())
    return intact


def _make(tasks: list[_Task], finished: dict[int, TokenShard], processes: int) -> Iterator[tuple[int, TokenShard]]:
    """Yields all shards with their numbers: the finished ones, then the others as they are made."""
    yield from sorted(finished.items())
    if processes == 1 or len(tasks) <= 1:
        for task in tasks:
            yield task.number, _make_shard(task)
        return
    # Not forked: a fork of a process with threads (such as the progress bar's) may inherit a lock that stays locked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)), context, initializer=_end_with_parent, initargs=(os.getpid(),)
    )
    try:
        futures: dict[Future[TokenShard], int] = {pool.submit(_make_shard, task): task.number for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process was killed (out of memory?); finished shards are kept: run the same command "
            "again, with fewer --processes if memory is short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Makes this process end when its parent is gone, even if the parent was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_shard(task: _Task) -> TokenShard:
    """Makes the two files of a shard, and its record."""
    job = task.job
    source = job.sources[task.number][0]
    tokenizer = Tokenizer(task.tokenizer_path)
    if tokenizer.fingerprint != job.tokenizer:
        raise DataError(f"the tokenizer {task.tokenizer_path} has changed since the preparation began")
    lengths: list[int] = []
    causes = bytearray()
    paths = [task.directory / f"{task.name}.{kind}" for kind in ("tokens", "index")]
    with writing_whole(paths[0]) as tokens_file, writing_whole(paths[1]) as index_file:
        tokens, index = _HashedFile(tokens_file), _HashedFile(index_file)
        records = read_documents(source, job.text_field, max_bytes=job.max_document_bytes, expected=task.expected)
        for _, result in encode_documents(records, tokenizer, job.text_field, None):
            if isinstance(result, Fault):
                lengths.append(0)
                causes.append(1 + _CAUSES.index(result.value))
            else:
                lengths.append(len(result) + 1)
                causes.append(0)
                tokens.write(np.append(result, np.int32(job.eos_id)).astype(job.dtype).tobytes())
        starts = np.zeros(len(lengths) + 1, dtype="<i8")
        np.cumsum(lengths, out=starts[1:])
        index.write(starts.tobytes() + bytes(causes))
    shard = TokenShard(
        name=task.name,
        documents=len(lengths),
        tokens=int(starts[-1]),
        faults={cause: causes.count(1 + number) for number, cause in enumerate(_CAUSES) if 1 + number in causes},
        files={path.name: (file.size, file.digest) for path, file in zip(paths, (tokens, index), strict=True)},
    )
    write_record(_record(task), shard)
    return shard


class _HashedFile:
    """A file whose content is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256, self.size = file, hashlib.sha256(), 0

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.size += len(content)


def _record(task: _Task) -> Path:
    return task.directory / f"{task.name}.shard.json"


@contextmanager
def _locked_directory(output: Path) -> Iterator[None]:
    """Makes the directory, and locks it against other preparations."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / _LOCK).open("w") as file:
        if not lock(file):
            raise ConfigError(f"another process is writing to {output}; wait for it, or choose another directory")
        yield
    (output / _LOCK).unlink(missing_ok=True)
