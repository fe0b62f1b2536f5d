"""From `data.source` to a list of shards, and from a shard to its documents.

A shard is a file of JSON lines, possibly compressed, or a Parquet file, on the local disk or behind any URL that
fsspec understands (the Hub's `hf://` included). `datasets` resolves Hub datasets to their files. Lines are not
read with its text builder, which reads 10 MB pieces through several copies (a fifth of the speed and 200 MB more
on 60 MB of Wikipedia) and treats a lone carriage return as the end of a line.
"""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import fsspec
from fsspec.compression import compr as codecs
from fsspec.registry import known_implementations
from fsspec.utils import glob_translate

from sltrain_dist.data import token_shards
from sltrain_dist.data.documents import Record
from sltrain_dist.data.parquet import read_column
from sltrain_dist.data.remote import RemoteFile
from sltrain_dist.data.retry import Fetcher, status_of
from sltrain_dist.errors import DataError

_CODEC_OF_SUFFIX = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_LINES = re.compile(r"\.(json|jsonl|ndjson)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
_PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
_NOT_DOCUMENTS = re.compile(r"\.(arrow|csv|tsv|zip|tar|tgz|tar\.gz)$", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HTTP = ("httpx", "httpx2", "requests", "urllib3", "aiohttp")
"""Libraries that one or the other version of `datasets` and its kin speak HTTP with."""
_READ_BYTES = 1 << 18
"""Bytes that are asked of a connection at once."""


def resolve_source(
    source: str | list[str],
    *,
    subset: str | None = None,
    split: str = "train",
    key: str = "data.source",
    fetcher: Fetcher | None = None,
) -> list[str]:
    """The shards of a source: absolute local paths and URLs, sorted, each once.

    A directory of token shards is one entry, its manifest; the sizes of its files are checked.

    Args:
        source: A file, a directory (its files of JSON lines and Parquet, or token shards), a glob, a URL or URL glob,
            or a Hub dataset
            `owner/name`; or a list of these. Something that exists locally is never looked for on the Hub.
        subset: Configuration of a Hub dataset.
        split: Split of a Hub dataset.
        key: What the source is called in the configuration, for messages.
        fetcher: Decides about failures to list a URL. Default: one of the default policy.

    Raises:
        DataError: Nothing is there, the Hub cannot be reached, or token shards are damaged; the message names the
            entry.
    """
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise DataError(f"{key} is an empty list; name at least one file, directory, glob, URL or Hub dataset")
    shards = {shard for entry in entries for shard in _resolve_entry(entry, subset, split, key, fetcher or Fetcher())}
    for shard in sorted(shards):
        if Path(shard).name == token_shards.MANIFEST and (len(shards) > 1 or _is_url(shard)):
            raise DataError(
                f"{shard} belongs to token shards, which must lie on a local or mounted disk and be the only source; "
                f"name their directory alone in {key}"
            )
        if _NOT_DOCUMENTS.search(_without_query(shard)):
            raise DataError(
                f"{shard} is neither Parquet nor a file of JSON lines (one object with a text field a line, as in C4)"
            )
    return sorted(shards)


def read_documents(
    shard: str, text_field: str, first: int = 0, step: int = 1, fetcher: Fetcher | None = None
) -> Iterator[tuple[int, Record]]:
    r"""Documents `first`, `first + step`, … of a shard, with their indices (from 0): lines or rows, unparsed.

    Lines end with `\n` only. Memory is bounded by the longest line, or as
    :func:`sltrain_dist.data.parquet.read_column` says.

    Args:
        shard: One of :func:`resolve_source`'s.
        text_field: The column of a Parquet file; lines are left to :func:`sltrain_dist.data.documents.parse`.
        first: Index of the first document.
        step: Distance to the next.
        fetcher: Decides about failures to read a URL. Default: one of the default policy.

    Raises:
        DataError: The shard cannot be read to its end; names the shard and how far it was read.
    """
    done = 0
    try:
        with _open(shard, fetcher or Fetcher()) as file:
            if _PARQUET.search(_without_query(shard)):
                for index, text in read_column(file, shard, text_field, first, step):
                    done = index + 1
                    yield index, text
                return
            for index, line in enumerate(file):
                done = index + 1
                if index >= first and (index - first) % step == 0:
                    yield index, line
            if done == 0 and _codec(shard) is not None and num_bytes(shard) == 0:
                # The decompressors take a file of no bytes for an empty one; it is what a failed download leaves.
                raise DataError(f"{shard} has no bytes, so it is not a complete {_codec(shard)} file; fetch it again")
    # Any file system's plug-in and any decompressor may be at work here, each with exceptions of its own.
    except Exception as error:
        raise _reading_error(shard, done, error) from error


def _resolve_entry(entry: str, subset: str | None, split: str, key: str, fetcher: Fetcher) -> list[str]:
    if entry.startswith("file://"):
        entry = entry.removeprefix("file://")
    if _is_url(entry):
        return _resolve_url(entry, key, fetcher)
    path = Path(entry).expanduser()
    if entry and path.is_dir() and token_shards.is_prepared(path):
        return [str(Path(token_shards.open_manifest(path).directory) / token_shards.MANIFEST)]
    if entry and path.is_dir():
        return _document_files([str(child.absolute()) for child in path.iterdir() if child.is_file()], entry)
    if path.is_file():
        return [str(path.absolute())]
    if re.search(r"[*?[]", entry):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        files = [str(Path(match).absolute()) for match in matches if Path(match).is_file()]
        if not files:
            raise DataError(f"no file matches the glob {entry!r} (working directory {Path.cwd()}); check {key}")
        return files
    if _HUB_ID.fullmatch(entry) and not any(kind.search(entry) for kind in (_LINES, _PARQUET, _NOT_DOCUMENTS)):
        return _resolve_hub(entry, subset, split, key, fetcher)
    raise DataError(
        f"there is no file or directory {entry!r} (working directory {Path.cwd()}), and it is neither a URL nor a "
        f"Hub dataset of the form owner/name; check {key}"
    )


def _resolve_url(url: str, key: str, fetcher: Fetcher) -> list[str]:
    http = url.startswith(("http://", "https://"))
    is_glob = re.search(r"[*]" if http else r"[*?[]", url) is not None
    if http and not is_glob:
        return [url]
    try:
        found = fetcher.call(url, lambda: _list_url(url, is_glob))
    except DataError:
        raise
    except Exception as error:  # as above: any plug-in's
        raise DataError(f"cannot list {url}: {_text(error)}; {_remedy(error, url) or f'check {key}'}") from error
    if not found:
        raise DataError(f"no file matches the glob {url!r}; check {key}")
    return found


def _list_url(url: str, is_glob: bool) -> list[str]:
    file_system, path = fsspec.core.url_to_fs(url)
    if is_glob:
        return [file_system.unstrip_protocol(match) for match in _glob(file_system, path)]
    if file_system.info(path)["type"] == "directory":
        children = [file_system.unstrip_protocol(child) for child in file_system.ls(path, detail=False)]
        return _document_files(children, url)
    return [url]


def _glob(file_system: fsspec.AbstractFileSystem, pattern: str) -> Iterator[str]:
    """Files that match a glob. fsspec's own takes a directory that it could not list for an empty one."""
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
            if name.rstrip("/").endswith(("/.", "/..")):  # links of an HTTP server's listing
                continue
            if entry["type"] == "directory":
                if levels is None or name.rstrip("/").count("/", len(root)) < levels:
                    directories.append(name)
            elif matches(name):
                yield name


def _document_files(files: list[str], directory: str) -> list[str]:
    if found := [file for file in files if _LINES.search(file) or _PARQUET.search(file)]:
        return found
    raise DataError(
        f"the directory {directory!r} holds no *.json, *.jsonl, *.ndjson (also .gz, .bz2, .xz, .zst) or *.parquet "
        f"among its {len(files)} files; subdirectories need a glob such as '{directory.rstrip('/')}/**/*.json.gz'"
    )


def _resolve_hub(name: str, subset: str | None, split: str, key: str, fetcher: Fetcher) -> list[str]:
    # Here, because it takes a second to import and only Hub datasets need it.
    import datasets

    def ask() -> datasets.DatasetBuilder:
        try:
            return datasets.load_dataset_builder(name, subset)
        except Exception as error:
            raise _on_the_way(error) from None

    try:
        builder = ask() if datasets.config.HF_HUB_OFFLINE else fetcher.call(f"the Hub's {name}", ask)
    except Exception as error:
        raise DataError(
            f"{name!r} is no local file or directory (working directory {Path.cwd()}), so it was looked for as a "
            f"dataset on the Hugging Face Hub, which failed too: {_text(error)}. If a path was meant, correct "
            f"{key}; if the dataset, check its name, {key.replace('source', 'subset')}, the network, HF_HUB_OFFLINE "
            "and, for a private or gated one, HF_TOKEN"
        ) from error
    files_of_split = {
        str(key): [str(file) for file in files] for key, files in (builder.config.data_files or {}).items()
    }
    if split not in files_of_split:
        raise DataError(f"the Hub dataset {name!r} has no files for split {split!r}; it has {sorted(files_of_split)}")
    files = files_of_split[split]
    if not files or not all(_LINES.search(file) or _PARQUET.search(file) for file in files):
        raise DataError(
            f"the Hub dataset {name!r} is stored neither as JSON lines, as allenai/c4 is, nor as Parquet (first file "
            f"of {split!r}: {files[:1]})"
        )
    return files


def _on_the_way(error: Exception) -> Exception:
    """The failure of the network behind an error of `datasets`, which turns most into files that are not found."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, Exception) and (status_of(found) or type(found).__module__.partition(".")[0] in _HTTP):
            return found
        found = found.__cause__ or found.__context__
    return error


@contextmanager
def _open(shard: str, fetcher: Fetcher) -> Iterator[IO[bytes]]:
    """Opens a shard for reading, decompressing."""
    codec = _codec(shard)
    if codec is not None and codec not in codecs:
        raise DataError(f"reading {shard} needs the {codec} codec: pip install zstandard")
    with ExitStack() as stack:
        file: IO[bytes]
        if _is_url(shard):
            has_end = codec is not None or _PARQUET.search(_without_query(shard)) is not None
            remote = stack.enter_context(RemoteFile(shard, fetcher, has_end=has_end))
            file = stack.enter_context(io.BufferedReader(remote, _READ_BYTES))
        else:
            file = stack.enter_context(Path(shard).open("rb"))
        yield stack.enter_context(codecs[codec](file, mode="rb")) if codec else file


def _codec(shard: str) -> str | None:
    return _CODEC_OF_SUFFIX.get(os.path.splitext(_without_query(shard))[1].lower())  # noqa: PTH122 (may be a URL)


def num_bytes(shard: str) -> int | None:
    """Size of a shard's file, or None where the server does not say."""
    if not _is_url(shard):
        return Path(shard).stat().st_size
    file_system, path = fsspec.core.url_to_fs(shard)
    size = file_system.size(path)
    return None if size is None else int(size)


def _reading_error(shard: str, done: int, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    is_parquet = _PARQUET.search(_without_query(shard)) is not None
    where = f"after {done} {'rows' if is_parquet else 'lines'}" if done else "at its start"
    if remedy := _remedy(error, shard):
        return DataError(f"cannot read the shard {shard}: {_text(error)}; {remedy}")
    if isinstance(error, FileNotFoundError):
        return DataError(f"the shard {shard} is not there (any more); put it back, or correct the source")
    if _codec(shard) is not None or is_parquet:
        return DataError(
            f"cannot read the shard {shard} {where}: {_text(error)}. A corrupt or truncated file must be fetched "
            "again, or taken out of the source"
        )
    return DataError(f"cannot read the shard {shard} {where}: {_text(error)}")


def _remedy(error: Exception, url: str) -> str | None:
    """What to install or to check, where the error of a URL tells."""
    protocol, _, path = url.partition("://")
    if not path:
        return None
    if isinstance(error, ImportError):
        package = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
        return f"pip install {package}"
    if status_of(error) in (401, 403) or isinstance(error, PermissionError):
        return f"check the credentials for {protocol}://"
    return None


def _is_url(shard: str) -> bool:
    return "://" in shard


def _without_query(shard: str) -> str:
    return shard.split("?", 1)[0] if _is_url(shard) else shard


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
