"""The levers of a search, which are named sets of settings to try, and the default levers (no torch)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sltrain_dist.config.load import build_config, merged, parse_override
from sltrain_dist.config.rules import check_fields, field_value
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)

_SELECTIVE = {"train.activation_checkpointing": "selective"}

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"train.activation_checkpointing": "none"},
    "every 2nd layer": {**_SELECTIVE, "train.checkpoint_policy": "blocks", "train.checkpoint_every": 2},
    "all but products": {**_SELECTIVE, "train.checkpoint_policy": "ops"},
    "all but attention": {**_SELECTIVE, "train.checkpoint_policy": "attention"},
    "full": {"train.activation_checkpointing": "full"},
}

_FIXED = ("train.global_batch", "train.steps", "train.tokens", "data.seq_len", "seed", "run_dir", "preset")
"""Keys that are never varied, because a search compares ways to make the same updates."""


@dataclass(frozen=True)
class Setting:
    """One setting of a lever: its label in tables, and its values by dotted key of the configuration."""

    label: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Lever:
    """A named set of settings, one of which is chosen in each combination of a search."""

    name: str
    settings: tuple[Setting, ...]

    @property
    def keys(self) -> set[str]:
        """Dotted keys that the settings change."""
        return {key for setting in self.settings for key in setting.values}


def default_levers(config: Config, ranks: int, fixed: Collection[str] = ()) -> list[Lever]:
    """Returns the levers of a search without `--vary`, which change neither the model's size nor the global batch.

    With one rank, the engine is not varied, see :func:`for_one_device`. Levers that would change one of the `fixed`
    dotted keys are left out.
    """
    levers = [
        _lever("state bits", "optim.state_bits", [16, 8, 4]),
        _lever("update", "optim.update", ["whole", "per_layer"]),
        Lever("recompute", tuple(Setting(label, values) for label, values in _RECOMPUTE.items())),
        _lever("micro-batch", "train.micro_batch", _micro_batches(config, ranks)),
    ]
    if config.reparam.method == "sltrain":
        levers += [
            _lever("support", "reparam.support", ["random", "stratified", "blocks"]),
            _lever("path", "reparam.path", ["auto", "materialize", "factored"]),
        ]
    if ranks > 1:
        levers.append(Lever("engine", tuple(_engines())))
    return [lever for lever in levers if not lever.keys & set(fixed)]


def for_one_device(config: Config) -> Config:
    """Returns the configuration with the engine to use on a single device.

    That is ddp, which adds no memory on one device, while the other engines allocate buffers for communication. A
    configuration that cannot be run with ddp, such as one with parallel.cpu_offload, keeps its engine.
    """
    alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"engine": "ddp"})})
    return config if any(check_fields(alone)) else alone


def named_levers(config: Config, ranks: int, varied: Sequence[str]) -> list[Lever]:
    """Returns the levers given by the values of `--vary`: `section.key=value,value,…`, or a default lever's name.

    Raises:
        ConfigError: A key or lever does not exist, a value is invalid, or a key must not be varied.
    """
    defaults = {lever.name: lever for lever in default_levers(config, ranks)}
    levers = []
    for spec in varied:
        if spec in defaults:
            levers.append(defaults[spec])
            continue
        key, equals, values = spec.partition("=")
        if not equals:
            names = ", ".join(f"{name!r}" for name in defaults)
            raise ConfigError(f"--vary {spec!r} is neither section.key=value,value,… nor one of {names}")
        if key in _FIXED or "." not in key:
            raise ConfigError(f"--vary {key}: a search never varies {key}; choose another key")
        _, parsed = parse_override(f"{key}=[{values}]")
        if not parsed:
            raise ConfigError(f"--vary {key}= has no values; write {key}=value,value,…")
        settings = (Setting(_label(value), {key: _checked(config, key, value)}) for value in parsed)
        levers.append(Lever(key, tuple(settings)))
    keys = Counter(key for lever in levers for key in sorted(lever.keys))
    twice = next((key for key, count in keys.items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"--vary: {twice} is varied twice; list all its values in one --vary")
    return levers


def _checked(config: Config, key: str, value: Any) -> Any:
    """Returns a value as its field stores it; raises ConfigError if it is invalid, regardless of the other settings."""
    section, _, name = key.partition(".")
    values = config.model_dump()
    try:
        return getattr(type(getattr(config, section)).model_validate({**values[section], name: value}), name)
    except (ValidationError, AttributeError):
        build_config(merged(values, {section: {name: value}}), {f"{section}.{name}": "--vary"})
        raise


def _lever(name: str, key: str, values: Sequence[Any]) -> Lever:
    return Lever(name, tuple(Setting(_label(value), {key: value}) for value in values))


def _label(value: Any) -> str:
    return json.dumps(value).strip('"')  # null, true, 8, blocks


def _micro_batches(config: Config, ranks: int) -> list[int]:
    """Returns the powers of two and the configured size that divide a rank's share of the global batch."""
    each = config.train.global_batch // ranks
    sizes = {*_MICRO_BATCHES, field_value(config, "train.micro_batch")}
    return sorted(size for size in sizes if each % size == 0 and size <= each)


def _engines() -> list[Setting]:
    settings = [Setting("ddp", {"parallel.engine": "ddp"})]
    for shard in ("factors", "all"):
        settings.append(Setting(f"fsdp, {shard}", {"parallel.engine": "fsdp", "parallel.shard": shard}))
        for stage in (1, 2, 3):
            values = {"parallel.engine": "zero", "parallel.zero_stage": stage, "parallel.shard": shard}
            settings.append(Setting(f"zero {stage}, {shard}", values))
    return settings
