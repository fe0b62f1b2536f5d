"""Paths as people write them: `~`, environment variables, and what cannot be a path."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sltrain_dist.errors import ConfigError

_REMOTE = re.compile(r"(?!file:|sqlite:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
"""How URLs begin that do not name a file of this machine."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/sltrain_dist, or ~/.cache/sltrain_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sltrain_dist"


def expand(text: str) -> str:
    """Expands `~`, `~user`, `$NAME` and `${NAME}` at their places in a path; URLs stay as they are.

    Raises:
        ValueError: The text is empty, or a variable or a home directory in it does not exist. The message says what to
            change.
    """
    if not text.strip():
        raise ValueError("is empty; give a path")
    if "\0" in text:
        raise ValueError("contains a NUL character, which no path can")
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
        raise ValueError(f"there is no home directory {user}; for a file of that name write ./{expanded}") from None


def path_option(name: str, kind: Callable[[str], Any] = Path) -> Callable[[str], Any]:
    """A parser for the command-line option `name`, whose value is a path.

    The parser raises ConfigError where :func:`expand` refuses the text. `kind` is `str` where it may be a URL.
    """

    def parse(text: str) -> Any:
        try:
            return kind(expand(str(text)))
        except ValueError as error:
            raise ConfigError(f"{name} {str(text)!r}: {error}") from None

    return parse
