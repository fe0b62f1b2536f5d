"""Documents, and how they are read from a user's text and JSON files."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from sltrain_dist.errors import ConfigError, DataError

TxtUnit = Literal["file", "paragraph"]

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass(frozen=True, slots=True)
class Document:
    """One document on its way into a corpus."""

    text: str
    url: str
    """Where it came from: without absolute paths, so that a corpus does not depend on the machine."""
    source: str
    """What the manifest counts it under: a Python package, or a file."""


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns name, sorted, each once. `**` descends into directories.

    Raises:
        ConfigError: A pattern matches nothing, or a file is of an unknown kind.
    """
    found: set[Path] = set()
    for pattern in patterns:
        names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            hint = f"; name its files, as in {pattern}/*.txt" if Path(pattern).is_dir() else ""
            raise ConfigError(f"--input {pattern}: no such file, and no file matches{hint}")
        found.update(files)
    for path in found:
        if _kind(path) not in (*_JSON_SUFFIXES, *_TEXT_SUFFIXES):
            raise ConfigError(
                f"--input {path}: unknown kind of file; text files end in {', '.join(_TEXT_SUFFIXES)}, JSON lines in "
                f"{', '.join(_JSON_SUFFIXES)}, either with or without .gz"
            )
    return sorted(found)


def read_documents(path: Path, *, text_field: str = "text", txt_unit: TxtUnit = "file") -> Iterator[Document]:
    """The documents of a text file or of a file of JSON lines, gzipped or not.

    Args:
        path: A file that :func:`find_inputs` accepts.
        text_field: Key of the text in each JSON line. A string under `url` is kept.
        txt_unit: What a document is in a text file: the whole file, or the lines between two blank lines.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object with text. The message names it.
    """
    try:
        # Bytes that are not UTF-8 are likelier in text files than a text not worth reading.
        errors = "strict" if _kind(path) in _JSON_SUFFIXES else "replace"
        with cast(
            IO[str], (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors=errors)
        ) as file:
            if _kind(path) in _JSON_SUFFIXES:
                yield from _json_documents(file, path.name, text_field)
            else:
                for number, text in enumerate(_paragraphs(file) if txt_unit == "paragraph" else [file.read()]):
                    yield Document(text, f"file:{path.name}#{number}", path.name)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _kind(path: Path) -> str:
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return suffixes[-1].lower() if suffixes else ""


def _paragraphs(file: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in file:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


def _json_documents(file: IO[str], name: str, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {number}: not JSON ({error}); one object a line is expected") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{name}, line {number}: no text under {text_field!r} (there is: {keys}); see --text-field")
        # JSON can escape half of a surrogate pair, which no UTF-8 file can hold.
        text = row[text_field].encode("utf-8", "replace").decode()
        url = row.get("url")
        yield Document(text, url if isinstance(url, str) else f"file:{name}#{number - 1}", name)
