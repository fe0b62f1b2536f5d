"""The settings in which two configurations differ (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sltrain_dist.config.schema import Config


def changed_settings(before: Config, now: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, old value, new value) of all settings that differ."""
    old, new = flatten(before.model_dump()), flatten(now.model_dump())
    if old["reparam.support_seed"] != new["reparam.support_seed"]:  # null stands for a seed, perhaps for the same one
        old["reparam.support_seed"], new["reparam.support_seed"] = before.support_seed, now.support_seed
    for key in new:
        if old.get(key) != new[key]:
            yield key, old.get(key), new[key]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Converts nested mappings to a single one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
