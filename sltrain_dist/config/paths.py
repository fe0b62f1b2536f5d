"""Expansion of paths as users write them, with `~` and environment variables, and rejection of invalid ones."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sltrain_dist.errors import ConfigError

_REMOTE = re.compile(r"(?!file:|sqlite:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
"""Matches the beginning of URLs that do not refer to a local file."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/sltrain_dist, or ~/.cache/sltrain_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sltrain_dist"


def expand(text: str) -> str:
    """Expands `$NAME` and `${NAME}`, and a leading `~` or `~user`, in a path; remote URLs are returned unchanged.

    Raises:
        ValueError: The text is empty or cannot be a path, or a variable or home directory in it does not exist. The
            message says what to change.
    """
    if not text.strip():
        raise ValueError("is empty; give a path")
    if "\0" in text:
        raise ValueError("contains a NUL character, which paths cannot contain")
    if _REMOTE.match(text):
        return text
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise ValueError(f"has characters that file names cannot have in {encoding}; set PYTHONUTF8=1") from None

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            state = "is empty" if name in os.environ else "is not set"
            raise ValueError(f"the environment variable {name} {state}; set it, or write the path out")
        return os.environ[name]

    expanded = _VARIABLE.sub(value, text)
    if not expanded.startswith("~"):
        return expanded
    user, slash, below = expanded.partition("/")
    try:
        return f"{Path(user).expanduser()}{slash}{below}"
    except RuntimeError:
        raise ValueError(f"there is no home directory {user}; for a file of that name, write ./{expanded}") from None


def path_option(name: str, kind: Callable[[str], Any] = Path) -> Callable[[str], Any]:
    """Returns a parser for the command-line option `name`, whose value is a path.

    The parser raises ConfigError if :func:`expand` rejects the text. Set `kind` to `str` if it may be a URL.
    """

    def parse(text: str) -> Any:
        try:
            return kind(expand(str(text)))
        except ValueError as error:
            raise ConfigError(f"{name} {str(text)!r}: {error}") from None

    return parse
