"""Resolution of `data.source` to a list of shards, and reading of a shard's documents.

A shard is a file of JSON lines, possibly compressed, or a Parquet or Arrow file, on the local disk or behind any URL
that fsspec understands (the Hub's `hf://` included). `datasets` resolves Hub datasets, and what it has saved to
disk, to files. Its text builder is not used to read lines: it reads 10 MB pieces through several copies (a fifth of
the speed and 200 MB more on 60 MB of Wikipedia) and treats a lone carriage return as the end of a line.
"""

from __future__ import annotations

import glob
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.utils import glob_translate

from sltrain_dist.data.documents import Fault, Record
from sltrain_dist.data.sources import token_shards
from sltrain_dist.data.sources.directory import Report, corpus_files, document_files, matching_files
from sltrain_dist.data.sources.identity import FileIdentity
from sltrain_dist.data.sources.kinds import DOCUMENTS, MANIFEST, MAX_DOCUMENT_BYTES, TABLES, Kind, is_url, kind_of
from sltrain_dist.data.sources.opening import describe, opened, reading_error, remedy_for
from sltrain_dist.data.sources.retry import Fetcher, status_of
from sltrain_dist.data.sources.tables import read_column
from sltrain_dist.errors import DataError

_SAVED_BY_DATASETS = ({"dataset_dict.json"}, {"state.json", "dataset_info.json"})
"""Files that mark a directory made by `save_to_disk`, with several splits or with one."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HTTP = ("httpx", "httpx2", "requests", "urllib3", "aiohttp")
"""HTTP libraries that some version of `datasets` or of its dependencies uses."""
_SKIP_BYTES = 1 << 20
"""Bytes read at a time to skip the rest of a line that is too long."""


def resolve_source(
    source: str | list[str],
    *,
    subset: str | None = None,
    split: str = "train",
    key: str = "data.source",
    fetcher: Fetcher | None = None,
    report: Report = lambda line: None,
    with_text: bool = False,
) -> list[str]:
    """Returns the shards of a source: absolute local paths and URLs, sorted, without duplicates.

    A directory of token shards gives one entry, its manifest; the sizes of its files are checked.

    Args:
        source: A file, a directory (the documents of the split in it, see
            :func:`sltrain_dist.data.sources.directory.document_files`; a corpus of `sltrain prepare-text`;
            token shards; what `datasets` has saved), a glob, a URL or URL glob, or a Hub dataset `owner/name`; or a
            list of these. A name that exists locally is never looked up on the Hub.
        subset: Configuration of a Hub dataset.
        split: Split of a Hub dataset or of a directory.
        key: Name of the source in the configuration, for messages.
        fetcher: Retries failed listings of URLs. None: one with the default policy.
        report: Told about surprising choices of files in a directory or glob.
        with_text: Whether plain text is accepted too.

    Raises:
        DataError: An entry does not exist, the Hub cannot be reached, or token shards are damaged.
    """
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise DataError(f"{key} is an empty list; name at least one file, directory, glob, URL or Hub dataset")
    resolver = _Resolver(subset, split, key, fetcher or Fetcher(), report, with_text)
    shards = {shard for entry in entries for shard in resolver.resolve(entry)}
    for shard in sorted(shards):
        if Path(shard).name == token_shards.MANIFEST and (len(shards) > 1 or is_url(shard)):
            raise DataError(
                f"{shard} belongs to token shards, which must be on a local or mounted disk and the only source; "
                f"set {key} to their directory alone"
            )
        if kind_of(shard) is None and token_shards.is_prepared(Path(shard).parent):
            raise DataError(
                f"{shard} is a file of token shards; set {key} to their directory {Path(shard).parent} alone"
            )
        if kind_of(shard) is Kind.FOREIGN:
            raise DataError(
                f"{shard} is not Parquet, Arrow or JSON lines (one object with a text field per line, as in C4); "
                f"convert it, or leave it out of {key}"
            )
        if kind_of(shard) is Kind.PLAIN_TEXT and not with_text:
            given = shlex.quote(source) if isinstance(source, str) else shard
            raise DataError(
                f"{shard} is plain text, not JSON lines; convert it with "
                f"`sltrain prepare-text --input {given} --output DIR` and set {key}=DIR"
            )
    return sorted(shards)


def read_documents(
    shard: str,
    text_field: str,
    first: int = 0,
    step: int = 1,
    fetcher: Fetcher | None = None,
    *,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    expected: FileIdentity | None = None,
    encoding: str | None = None,
) -> Iterator[tuple[int, Record]]:
    r"""Yields documents `first`, `first + step`, … of a shard with their indices (from 0): lines or rows, unparsed.

    Lines end with `\n` only. Memory is bounded by `max_bytes`; for tables, see
    :func:`sltrain_dist.data.sources.tables.read_column`.

    Args:
        shard: A shard from :func:`resolve_source`.
        text_field: The column of a table; lines are parsed later, by :func:`sltrain_dist.data.documents.parse`.
        first: Index of the first document.
        step: Distance to the next.
        fetcher: Retries failed reads of URLs. None: one with the default policy.
        max_bytes: Longer lines, and longer texts of a table, come as :attr:`Fault.TOO_LONG`.
        expected: Identity of a local file, checked before and after reading. None: no check.
        encoding: Encoding of the lines. None: UTF-8, or UTF-16 or UTF-32 if the file's first bytes show it.

    Raises:
        DataError: The shard cannot be read to its end; the message names it and how far it was read.
    """
    done = 0
    try:
        with opened(shard, fetcher or Fetcher(), expected=expected, encoding=encoding) as file:
            if kind_of(shard) in TABLES:
                for index, text in read_column(file, shard, text_field, first, step, max_bytes):
                    done = index + 1
                    yield index, text
                return
            for index, line in enumerate(_lines(file, max_bytes)):
                done = index + 1
                if index >= first and (index - first) % step == 0:
                    yield index, line
    # Plug-ins of file systems and decompressors raise exceptions of any type.
    except Exception as error:
        raise reading_error(shard, done, error) from error


def _lines(file: io.BufferedReader, max_bytes: int) -> Iterator[Record]:
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_SKIP_BYTES)
        yield Fault.TOO_LONG


@dataclass(frozen=True)
class _Resolver:
    """Resolves one entry of a source at a time; see :func:`resolve_source`."""

    subset: str | None
    split: str
    key: str
    fetcher: Fetcher
    report: Report
    with_text: bool

    def resolve(self, entry: str) -> list[str]:
        entry = entry.removeprefix("file://")
        if is_url(entry):
            return self._url(entry)
        path = Path(entry).expanduser()
        if path.name == MANIFEST and corpus_files(path.parent, self.split):
            path = path.parent
        if entry and path.is_dir():
            return self._directory(path)
        if path.is_file():
            return [str(path.absolute())]
        if re.search(r"[*?[]", entry):
            matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            files = [str(Path(match).absolute()) for match in matches if Path(match).is_file()]
            if found := matching_files(files, entry, self.split, self.report):
                return found
            raise DataError(f"no file matches the glob {entry!r} (working directory {Path.cwd()}); check {self.key}")
        if _HUB_ID.fullmatch(entry) and kind_of(entry) is None:
            return _resolve_hub(entry, self.subset, self.split, self.key, self.fetcher)
        raise DataError(
            f"there is no file or directory {entry!r} (working directory {Path.cwd()}), and it is neither a URL nor a "
            f"Hub dataset of the form owner/name; check {self.key}"
        )

    def _directory(self, path: Path) -> list[str]:
        if token_shards.is_prepared(path):
            return [str(Path(token_shards.open_manifest(path).directory) / token_shards.MANIFEST)]
        if any(all((path / name).is_file() for name in names) for names in _SAVED_BY_DATASETS):
            return _saved_arrow_files(path, self.split)
        if (files := corpus_files(path, self.split, self.report)) is not None:
            return files
        children = [str(child.absolute()) for child in path.iterdir() if child.is_file()]
        return document_files(children, str(path), self.split, self.report, with_text=self.with_text)

    def _url(self, url: str) -> list[str]:
        http = url.startswith(("http://", "https://"))
        is_glob = re.search(r"[*]" if http else r"[*?[]", url) is not None
        if http and not is_glob:
            return [url]
        try:
            found = self.fetcher.call(url, lambda: self._list(url, is_glob))
        except DataError:
            raise
        except Exception as error:  # plug-ins raise exceptions of any type
            remedy = remedy_for(error, url) or f"check {self.key}"
            raise DataError(f"cannot list {url}: {describe(error)}; {remedy}") from error
        if not found:
            raise DataError(f"no file matches the glob {url!r}; check {self.key}")
        return found

    def _list(self, url: str, is_glob: bool) -> list[str]:
        file_system, path = fsspec.core.url_to_fs(url)
        if is_glob:
            found = [file_system.unstrip_protocol(match) for match in _glob(file_system, path)]
            return matching_files(found, url, self.split, self.report)
        if file_system.info(path)["type"] == "directory":
            children = [file_system.unstrip_protocol(child) for child in file_system.ls(path, detail=False)]
            return document_files(children, url, self.split, self.report, with_text=self.with_text)
        return [url]


def _saved_arrow_files(path: Path, split: str) -> list[str]:
    """Returns the Arrow files of a directory made by `save_to_disk`."""
    # Imported here, because it takes a second.
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged directory may raise errors of any type
        raise DataError(f"`datasets` cannot read what it saved to {path}: {describe(error)}; save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"the data set in {path} has no split {split!r}; it has {sorted(saved)}")
        saved = saved[split]
    return [str(Path(file["filename"]).absolute()) for file in saved.cache_files]


def _glob(file_system: fsspec.AbstractFileSystem, pattern: str) -> Iterator[str]:
    """Yields the files that match a glob. fsspec's own glob takes a directory that it cannot list for an empty one."""
    magic = re.search(r"[*?[]", pattern)
    assert magic is not None
    root = pattern[: pattern.rfind("/", 0, magic.start()) + 1]
    levels = None if "**" in pattern else pattern.count("/", len(root))
    matches = re.compile(glob_translate(pattern)).match
    directories = [root]
    while directories:
        directory = directories.pop()
        try:
            entries = file_system.ls(directory, detail=True)
        except FileNotFoundError:
            if directory != root:
                raise
            return
        for entry in entries:
            name = entry["name"]
            if name.rstrip("/").endswith(("/.", "/..")):  # links in an HTTP server's listing
                continue
            if entry["type"] == "directory":
                if levels is None or name.rstrip("/").count("/", len(root)) < levels:
                    directories.append(name)
            elif matches(name):
                yield name


def _resolve_hub(name: str, subset: str | None, split: str, key: str, fetcher: Fetcher) -> list[str]:
    # Imported here, because it takes a second and only Hub datasets need it.
    import datasets

    def load_builder() -> datasets.DatasetBuilder:
        try:
            return datasets.load_dataset_builder(name, subset)
        except Exception as error:
            raise _network_cause(error) from None

    try:
        offline = datasets.config.HF_HUB_OFFLINE
        builder = load_builder() if offline else fetcher.call(f"the Hub's {name}", load_builder)
    except Exception as error:
        raise DataError(
            f"{name!r} is not a local file or directory (working directory {Path.cwd()}), so it was looked up as a "
            f"dataset on the Hugging Face Hub, which failed too: {describe(error)}. If you meant a path, correct "
            f"{key}; if a dataset, check its name, {key.replace('source', 'subset')}, the network, HF_HUB_OFFLINE "
            "and, for a private or gated dataset, HF_TOKEN"
        ) from error
    files_of_split = {
        str(key): [str(file) for file in files] for key, files in (builder.config.data_files or {}).items()
    }
    if split not in files_of_split:
        raise DataError(f"the Hub dataset {name!r} has no files for split {split!r}; it has {sorted(files_of_split)}")
    files = files_of_split[split]
    if not files or not all(kind_of(file) in DOCUMENTS for file in files):
        raise DataError(
            f"the Hub dataset {name!r} is not stored as JSON lines (as allenai/c4 is), Parquet or Arrow "
            f"(first file of {split!r}: {files[:1]})"
        )
    return files


def _network_cause(error: Exception) -> Exception:
    """Returns the network error behind an error of `datasets`, which reports most of them as "file not found"."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Exception) and (status_of(cause) or type(cause).__module__.partition(".")[0] in _HTTP):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error
