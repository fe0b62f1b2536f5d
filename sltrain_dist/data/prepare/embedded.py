"""Documents of the embedded corpus: English prose found in every Python installation.

They are docstrings (read from source with `ast`; nothing is imported or executed), the descriptions in packages'
metadata, and the language reference that `help()` shows. They allow training without any download. The same
installed packages give the same documents on every machine.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import json
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sltrain_dist.data.prepare.inputs import Document

EXTRACTION_VERSION = 1
"""Raise this when a change of the rules, here or in `markup` and `clean`, changes the embedded corpus."""

_SKIPPED_DIRECTORIES = frozenset(
    {"tests", "test", "idle_test", "_vendor", "__pycache__", "site-packages", "dist-packages"}
)
_MIN_DOCSTRING_SHARE = 0.25
"""Files with a smaller share of triple-quoted text are skipped: they are most of the source, but hold little prose."""
_MAX_FILE_BYTES = 1_000_000
_MAX_PACKAGE_BYTES = 10_000_000
"""Largest amount of source parsed per package, so that no package dominates."""
_MAX_TOTAL_BYTES = 120_000_000
"""Largest amount of source parsed in total, which takes under half a minute."""
_SELF = "sltrain-dist"

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Package:
    """A top-level Python package: its source files and descriptions."""

    name: str
    files: tuple[tuple[str, Path], ...]
    """Names relative to the directory of packages, with forward slashes, and paths of the files."""
    descriptions: tuple[tuple[str, str], ...] = ()
    """Names and long descriptions of the distributions that belong to the package."""


@dataclass(frozen=True)
class Installation:
    """A Python installation: its standard library and distributions."""

    standard_library: Path | None
    distributions: tuple[importlib.metadata.Distribution, ...]
    python_version: str

    def versions(self) -> list[tuple[str, str]]:
        """Returns sorted names and versions, Python included: all that the embedded corpus depends on."""
        found = [(_name(d), d.version) for d in self.distributions]
        return sorted([*found, ("python", self.python_version)] if self.standard_library else found)

    def fingerprint(self) -> str:
        """Returns a hash of the versions and extraction rules, 16 hexadecimal digits. Cheap: reads no source."""
        key = json.dumps([EXTRACTION_VERSION, self.versions()])
        return hashlib.sha256(key.encode()).hexdigest()[:16]


def find_installation(directories: Sequence[Path] | None = None, standard_library: Path | None = None) -> Installation:
    """Returns the running interpreter's installation, or the one in the given directories.

    This project itself and editable installations are left out: their text changes without a new version.

    Args:
        directories: Directories of distributions. None: the interpreter's, and its standard library.
        standard_library: Used with `directories` only. None: no standard library.
    """
    if directories is None:
        directories = [Path(p) for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}]
        standard_library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=[str(d) for d in directories]):
        if distribution.metadata["Name"] and not _is_editable(distribution):
            found.setdefault(_name(distribution), distribution)  # an import finds the first on the path
    found.pop(_SELF, None)
    return Installation(standard_library, tuple(found[name] for name in sorted(found)), platform.python_version())


def find_packages(installation: Installation) -> list[Package]:
    """Returns the top-level packages, sorted by name. Distributions that share one (`google`) are merged."""
    files: dict[str, dict[str, Path]] = {}
    descriptions: dict[str, list[tuple[str, str]]] = {}
    if installation.standard_library:
        _add_files(files, _walk(installation.standard_library))
    for distribution in installation.distributions:
        modules = [(f, Path(str(f.locate()))) for f in distribution.files or () if f.suffix == ".py"]
        top_levels = _add_files(files, modules)
        package = min(top_levels, default=_name(distribution))
        if description := distribution.metadata["Description"]:
            descriptions.setdefault(package, []).append((_name(distribution), description))
    return [
        Package(name, tuple(sorted(files.get(name, {}).items())), tuple(sorted(descriptions.get(name, ()))))
        for name in sorted({*files, *descriptions})
    ]


def raw_documents(packages: Iterable[Package]) -> Iterator[Document]:
    """Yields the unprocessed docstrings, descriptions and help topics, within the limits on parsed source.

    Hashes of the names decide which files and packages are left out beyond the limits.
    """
    total = 0
    with _no_garbage_collection():
        for package in sorted(packages, key=lambda p: _hash(p.name)):
            for distribution, text in package.descriptions:
                yield Document(text, f"python://{distribution}#description", package.name)
            parsed = 0
            for name, path in sorted(package.files, key=lambda item: _hash(item[0])):
                source = _worth_parsing(path)
                if source is None or parsed + len(source) > _MAX_PACKAGE_BYTES or total > _MAX_TOTAL_BYTES:
                    continue
                parsed += len(source)
                total += len(source)
                for qualified_name, text in docstrings(source, is_topics=name == "pydoc_data/topics.py"):
                    yield Document(text, f"python://{name}#{qualified_name}", package.name)


def docstrings(source: bytes, *, is_topics: bool = False) -> Iterator[tuple[str, str]]:
    """Yields qualified names and docstrings in a module's source; nothing if it is not valid Python.

    Args:
        source: The file's bytes.
        is_topics: Whether the file is `pydoc_data/topics.py`, whose text is in one dictionary.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    if is_topics:
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                yield from sorted((str(k), str(v)) for k, v in ast.literal_eval(node.value).items())
        return
    yield from _walk_definitions(module, "")


def _walk_definitions(node: Definition, name: str) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(node, clean=False):
        # A string literal can hold half of a surrogate pair, which UTF-8 cannot encode.
        yield name, text.encode("utf-8", "replace").decode()
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _walk_definitions(child, f"{name}.{child.name}" if name else child.name)


def _walk(root: Path) -> Iterator[tuple[PurePosixPath, Path]]:
    for path in root.rglob("*.py"):
        yield PurePosixPath(path.relative_to(root).as_posix()), path


def _add_files(files: dict[str, dict[str, Path]], found: Iterable[tuple[PurePosixPath, Path]]) -> set[str]:
    top_levels = set()
    for name, path in found:
        if _SKIPPED_DIRECTORIES.isdisjoint(name.parts) and ".." not in name.parts:
            top_level = name.parts[0].removesuffix(".py")
            files.setdefault(top_level, {}).setdefault(str(name), path)
            top_levels.add(top_level)
    return top_levels


def _worth_parsing(path: Path) -> bytes | None:
    """Returns the file's bytes if it is readable, not too large, and much of it is triple-quoted; else None."""
    try:
        source = path.read_bytes()
    except OSError:  # listed by its distribution, but deleted
        return None
    quoted = sum(map(len, source.split(b'"""')[1::2])) + sum(map(len, source.split(b"'''")[1::2]))
    return source if len(source) <= _MAX_FILE_BYTES and quoted >= _MIN_DOCSTRING_SHARE * len(source) else None


def _name(distribution: importlib.metadata.Distribution) -> str:
    return str(distribution.metadata["Name"]).lower().replace("_", "-").replace(".", "-")


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable", False))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns garbage collection off: syntax trees have no cycles, and looking for some takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
