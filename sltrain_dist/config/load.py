"""Loading: preset, then YAML file, then dotted overrides, into a checked :class:`Config`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.rules import check_fields
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-3 as text; here it is the number that everyone means. Repeated keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is there twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Loads and checks a configuration.

    Args:
        path: A YAML file, or None for the defaults.
        overrides: `section.key=value` strings, values in YAML; they win over the file.

    Raises:
        ConfigError: The file cannot be read, or a key or a value is wrong. The message names the key, the
            value, where it came from, and what to change.
    """
    origin = {"": str(path) if path else "defaults"}
    values = _read_yaml(path) if path else {}
    for override in overrides:
        key, value = _parse_override(override)
        _set(values, key, value)
        origin[".".join(key)] = "command line"
    return build_config(values, origin)


def build_config(values: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Config:
    """Checks plain values (with presets applied) and returns the configuration.

    Args:
        values: What a YAML file holds: sections of values.
        origin: Where the values under a dotted key came from; "" for all others.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    origin = origin or {"": "configuration"}
    preset = values.get("preset")
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(_message(origin, ("preset",), preset, f"unknown preset{_hint(str(preset), PRESETS)}"))
        values = _merged(PRESETS[preset], values)
    try:
        config = Config.model_validate(dict(values))
    except ValidationError as error:
        problems = [_describe(origin, dict(item)) for item in error.errors()]
        raise ConfigError("\n".join(problems)) from None
    for key, reason in check_fields(config):
        raise ConfigError(_message(origin, tuple(key.split(".")), _get(config, key), reason))
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration, with every default written out."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, not a {type(values).__name__}")
    # An empty section (`eval:` with nothing under it) means "all defaults".
    return {k: {} if v is None and _is_section(k) else v for k, v in values.items()}


def _is_section(key: Any) -> bool:
    field = Config.model_fields.get(str(key))
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"command line: {override!r} is not of the form section.key=value")
    try:
        return tuple(key.split(".")), yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"command line: the value of {key} is not valid YAML: {error}") from None


def _set(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    for depth, part in enumerate(key[:-1]):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"command line: {'.'.join(key[: depth + 1])} is a value, not a section")
    values[key[-1]] = value


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in base.items()}
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _hint(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, [str(choice) for choice in choices], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(map(str, choices)))}"


def _known_keys(loc: tuple[str, ...]) -> list[str]:
    """Dotted keys that could stand beside the unknown key `loc`."""
    model: Any = Config
    for part in loc[:-1]:
        field = model.model_fields.get(part)
        if field is None or not hasattr(field.annotation, "model_fields"):
            return []
        model = field.annotation
    return list(model.model_fields)


def _describe(origin: Mapping[str, str], item: dict[str, Any]) -> str:
    loc = tuple(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        hint = _hint(loc[-1], _known_keys(loc))
        if "did you mean" not in hint and len(loc) == 1:  # perhaps a field without its section
            homes = [s for s, f in Config.model_fields.items() if loc[0] in getattr(f.annotation, "model_fields", ())]
            hint = f"; did you mean {homes[0]}.{loc[0]!s}?" if homes else hint
        return _message(origin, loc, item["input"], f"unknown key{hint}")
    # Members of a union (str | list[str]) come as extra parts of the location that no user wrote.
    while len(loc) > 1 and loc[-1] in {"str", "list[str]", "int"}:
        loc = loc[:-1]
    return _message(origin, loc, item["input"], item["msg"][:1].lower() + item["msg"][1:])


def _message(origin: Mapping[str, str], loc: tuple[str, ...], value: Any, reason: str) -> str:
    where = next((origin[k] for k in (".".join(loc[:n]) for n in range(len(loc), -1, -1)) if k in origin), "")
    return f"{where}: {'.'.join(loc)} = {value!r}: {reason}"
