"""Checks at the start that all ranks run the same code and configuration, naming the ranks that differ."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sltrain_dist import __version__
from sltrain_dist.config.differences import flatten
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.runtime.environment import Environment


def run_identity(config: Config) -> dict[str, Any]:
    """Returns what must be identical on all ranks before any work is done: code, libraries and configuration."""
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **flatten(config.model_dump()),
    }


def check_agreement(env: Environment, mine: Mapping[str, Any]) -> None:
    """Checks that `mine` is the same on all ranks.

    Raises:
        ConfigError: It is not. Raised on all ranks, naming the keys that differ and each rank's values.
    """
    text = json.dumps(mine, sort_keys=True, default=str)
    digests = env.gather(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone = env.gather({key: repr(value) for key, value in mine.items()})
    keys = dict.fromkeys(key for values in everyone for key in values)
    differing = [key for key in keys if len({values.get(key, "nothing") for values in everyone}) > 1]
    shown = "; ".join(f"{key} ({_ranks_by_value([r.get(key, 'nothing') for r in everyone])})" for key in differing)
    raise ConfigError(
        f"the ranks do not run the same thing; these differ: {shown}. "
        "Start all of them with the same code, packages, configuration and data"
    )


def _ranks_by_value(values: list[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    parts = []
    for value, same in ranks.items():
        shown = ", ".join(map(str, same[:4])) + (f" and {len(same) - 4} more" if len(same) > 4 else "")
        parts.append(f"rank{'s' if len(same) > 1 else ''} {shown}: {value}")
    return ", ".join(parts)


def code_version() -> str:
    """Returns the package's version and, as 16 hex digits, a hash of its source files."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return f"{__version__}, {digest.hexdigest()[:16]}"
