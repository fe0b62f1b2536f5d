"""Construction of corpora: the embedded one, which is cached, and those from a user's files."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sltrain_dist.config.paths import default_cache_dir
from sltrain_dist.data.prepare.clean import Cleaner, Deduplicator, Rules, unwrap
from sltrain_dist.data.prepare.embedded import Installation, find_installation, find_packages, raw_documents
from sltrain_dist.data.prepare.inputs import Document, InputOptions, find_inputs, read_documents
from sltrain_dist.data.prepare.markup import prose
from sltrain_dist.data.prepare.shards import (
    CorpusManifest,
    Split,
    is_complete,
    write_corpus,
)
from sltrain_dist.data.sources.kinds import base_name, printable
from sltrain_dist.data.sources.opening import num_bytes
from sltrain_dist.errors import ConfigError, DataError
from sltrain_dist.files import failing_as, lock, writing_directory

Report = Callable[[str], None]

EMBEDDED = "embedded"
_EMBEDDED_SHARDS = 4
_EMBEDDED_RULES = Rules(min_sentences=2, curly="line")
"""Docstrings are short, and remnants of code should not drop the prose around them."""
_REPORT_EVERY_S = 10.0
_VALIDATION_SHARE = (0.05, 0.08)
"""Target and largest share of the embedded corpus's text that is held out for validation."""


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Paths of the embedded corpus and its tokenizer."""

    train_glob: str
    validation_glob: str
    tokenizer: Path | None
    """None if no vocabulary size was given."""


@dataclass(frozen=True)
class PrepareOptions:
    """Options for preparing a user's documents."""

    inputs: InputOptions = field(default_factory=InputOptions)
    """Options for reading the files."""
    unwrap: bool = False
    """Join the lines of a paragraph, for text files wrapped at a fixed width."""
    clean: bool = True
    """Apply C4's line and page rules."""
    dedup: bool = True
    """Drop repeated documents and three-sentence spans."""
    min_sentences: int = Rules.min_sentences
    """Sentences that a page must keep."""
    validation_fraction: float = 0.01
    """Share of the documents that is held out for validation."""
    num_shards: int = 4
    """Number of shards of the training split."""


def build_embedded(cache_dir: Path | None, vocab_size: int | None, *, report: Report | None = None) -> EmbeddedCorpus:
    """Builds the embedded corpus and a tokenizer for it, unless they are cached.

    They are stored in `<cache>/embedded-<fingerprint>/`, where the fingerprint identifies the installed packages'
    versions. Safe to call from several processes at once: one builds, the others wait.

    Args:
        cache_dir: The cache. None: $XDG_CACHE_HOME/sltrain_dist, or ~/.cache/sltrain_dist.
        vocab_size: Number of pieces of the tokenizer; None: no tokenizer is made.
        report: Called with a line of text at each stage.

    Raises:
        ConfigError: The corpus is too small for the vocabulary.
        DataError: The cache cannot be written, or no prose is found.
    """
    # Imported here, because preparing data does not need SentencePiece.
    from sltrain_dist.data.tokenizer import train_tokenizer

    report = report or (lambda line: None)
    installation = find_installation()
    cache = cache_dir or default_cache_dir()
    directory = cache / f"{EMBEDDED}-{installation.fingerprint()}"
    tokenizer = None if vocab_size is None else directory / f"tokenizer-{vocab_size}.model"
    if not (is_complete(directory) and (tokenizer is None or tokenizer.is_file())):
        with _lock(cache, directory.name, report):
            if not is_complete(directory):
                shutil.rmtree(directory, ignore_errors=True)
                build_corpus_of_packages(installation, directory, report=report)
            if tokenizer is not None and vocab_size is not None and not tokenizer.is_file():
                report(f"training a tokenizer of {vocab_size} pieces on the embedded corpus; up to a few minutes")
                try:
                    # bpe: unigram takes ten times as long, packs 1 % better, and cannot find 32,000 pieces here.
                    train_tokenizer(_texts(directory), tokenizer, vocab_size=vocab_size, model_type="bpe")
                except ConfigError as error:
                    raise ConfigError(f"data.tokenizer=embedded, model.vocab_size={vocab_size}: {error}") from None
    return EmbeddedCorpus(
        train_glob=str(directory / f"{EMBEDDED}-train.*.json.gz"),
        validation_glob=str(directory / f"{EMBEDDED}-validation.*.json.gz"),
        tokenizer=tokenizer,
    )


def build_corpus_of_packages(
    installation: Installation,
    directory: Path,
    *,
    num_shards: int = _EMBEDDED_SHARDS,
    report: Report | None = None,
) -> CorpusManifest:
    """Writes the corpus of an installation's prose into `directory`, which must not exist.

    The validation split consists of whole packages, about a twentieth of the text: no package is in both splits.

    Raises:
        DataError: Fewer than two packages have prose, or the directory cannot be written.
    """
    report = report or (lambda line: None)
    dropped: Counter[str] = Counter()
    report("reading docstrings and descriptions of the installed packages, once for all runs; up to a few minutes")
    raw = _reported(raw_documents(find_packages(installation)), report)
    documents = list(_cleaned(raw, dropped))
    if len({document.source for document in documents}) < 2:
        raise DataError(
            "the embedded corpus needs two packages with prose, one for validation; set data.source to your own text"
        )
    report(f"writing {len(documents)} documents")
    # In package order, adjacent documents would be alike.
    documents.sort(key=lambda d: (_key(d.url), d.text))
    validation = _validation_packages(documents)
    making = failing_as(f"cannot make {directory}", DataError)
    with making, writing_directory(directory, shared=True) as temporary:
        return write_corpus(
            temporary,
            ((("validation" if d.source in validation else "train"), d) for d in documents),
            CorpusManifest(EMBEDDED, [f"{name} {version}" for name, version in installation.versions()]),
            num_shards=num_shards,
            dropped=dropped,
        )


def prepare_files(
    patterns: Sequence[str],
    output: Path,
    options: PrepareOptions,
    *,
    name: str = "corpus",
    report: Report | None = None,
) -> CorpusManifest:
    """Cleans, deduplicates, splits and shards a user's files into `output`.

    A document's split depends on its text alone, except that the first goes to validation and the second to
    training, so that neither is empty.

    Args:
        patterns: Inputs: plain text, or entries as in `data.source`.
        output: Directory to make. It must not exist, or be empty.
        options: How to read and clean the documents.
        name: Prefix of the shards' names.
        report: Called with a line of text for each file.

    Raises:
        ConfigError: The output exists, or a file is of an unknown kind.
        DataError: A pattern matches nothing, a file cannot be read, or fewer than two documents are left.
    """
    refuse_existing(output)
    report = report or (lambda line: None)
    shards = find_inputs(patterns, report)
    dropped: Counter[str] = Counter()
    inputs = [{"file": printable(base_name(shard)), "bytes": num_bytes(shard)} for shard in shards]
    with failing_as(f"cannot make {output}", DataError), writing_directory(output) as temporary:
        documents = _prepared(_read_all(shards, options, report), options, dropped)
        manifest = write_corpus(
            temporary,
            _split(documents, options.validation_fraction),
            CorpusManifest(name, inputs),
            num_shards=options.num_shards,
            dropped=dropped,
        )
        if "train" not in manifest.splits:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common()) or "none was found"
            raise DataError(
                f"not enough documents are left for a corpus ({reasons}); text wrapped at a fixed width needs "
                "--unwrap, and --no-clean turns C4's rules off"
            )
    return manifest


def refuse_existing(output: Path) -> None:
    """Raises ConfigError if the output directory exists and is not empty, because it would be overwritten."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} already exists; choose another directory or remove it")


def _reported(documents: Iterable[Document], report: Report) -> Iterator[Document]:
    """Passes documents through, and reports their number every few seconds."""
    last = time.monotonic()
    for count, document in enumerate(documents, start=1):
        if time.monotonic() - last >= _REPORT_EVERY_S:
            report(f"{count} docstrings and descriptions so far")
            last = time.monotonic()
        yield document


def _cleaned(documents: Iterable[Document], dropped: Counter[str]) -> Iterator[Document]:
    cleaner = Cleaner(_EMBEDDED_RULES, dropped)
    deduplicator = Deduplicator(_EMBEDDED_RULES.min_sentences, dropped)
    for document in documents:
        text = cleaner.clean(prose(document.text))
        if text and (text := deduplicator.keep(text)):
            yield Document(text, document.url, document.source)


def _validation_packages(documents: list[Document]) -> set[str]:
    """Chooses packages in order of their names' hashes, as long as they fit; the smallest if none does."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.source] += len(document.text)
    target, largest = (share * sizes.total() for share in _VALIDATION_SHARE)
    chosen: set[str] = set()
    total = 0
    for package in sorted(sizes, key=_key):
        if total < target and total + sizes[package] <= largest:
            chosen.add(package)
            total += sizes[package]
    return chosen or {min(sizes, key=lambda package: (sizes[package], package))}


def _read_all(shards: list[str], options: PrepareOptions, report: Report) -> Iterator[Document]:
    for number, shard in enumerate(shards, start=1):
        report(f"{number}/{len(shards)} {printable(base_name(shard))}")
        yield from read_documents(shard, options.inputs)


def _prepared(documents: Iterable[Document], options: PrepareOptions, dropped: Counter[str]) -> Iterator[Document]:
    cleaner = Cleaner(Rules(min_sentences=options.min_sentences), dropped)
    deduplicator = Deduplicator(options.min_sentences if options.clean else 1, dropped)
    for document in documents:
        text: str | None = unwrap(document.text) if options.unwrap else document.text.strip()
        if not text:
            dropped["empty"] += 1
            continue
        if options.clean:
            text = cleaner.clean(text)
        if text and options.dedup:
            text = deduplicator.keep(text)
        if text:
            yield Document(text, document.url, document.source)


def _split(documents: Iterable[Document], validation_fraction: float) -> Iterator[tuple[Split, Document]]:
    for number, document in enumerate(documents):
        held_out = number == 0 if number < 2 else _key(document.text) < validation_fraction * 2**64
        yield "validation" if held_out and validation_fraction > 0 else "train", document


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _texts(directory: Path) -> Iterator[str]:
    for path in sorted(directory.glob(f"{EMBEDDED}-train.*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from (json.loads(line)["text"] for line in file)


@contextmanager
def _lock(cache: Path, name: str, report: Report) -> Iterator[None]:
    """Waits until no other process builds `name`, so that only one does the work."""
    with failing_as(f"data.cache_dir = {cache} is not writable; set another", DataError):
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / f".{name}.lock").open("w")
    with file:
        if not lock(file):
            report(f"waiting for another process that builds the embedded corpus in {cache}; up to a few minutes")
            lock(file, wait=True)
        yield
