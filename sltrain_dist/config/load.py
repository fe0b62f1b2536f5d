"""Loading: preset, then YAML file, then dotted overrides, into a checked :class:`Config`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from sltrain_dist.config import strict_yaml
from sltrain_dist.config.paths import expand
from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.rules import check_fields, leaf_keys
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError

_Key = tuple[str, ...]

_MAX_BYTES = 1 << 20
"""Largest configuration file; parsing one of this size takes about three seconds."""

COMMAND_LINE = "command line"
"""Origin of the values that overrides set, in messages."""
_IS_A_SECTION = "this is a section; give it keys with values"
_UNION_MEMBERS = {"str": "text", "list[str]": "a list of texts"}
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Loads and checks a configuration.

    Args:
        path: A YAML file, or None for the defaults. `~` and environment variables are expanded if it is a string.
        overrides: `section.key=value` strings with YAML values; they take precedence over the file.
            `section={key: value}` sets these keys and leaves the other keys of the section unchanged.

    Raises:
        ConfigError: The file cannot be read, or a key or a value is invalid. The message has one line per problem,
            with the key, the value, its origin (file, preset or command line) and what to change.
    """
    values = {} if path is None else _read_yaml(path)
    origin = dict.fromkeys(leaf_keys(values), str(path)) | {"": "configuration" if path is None else str(path)}
    for override in overrides:
        key, value = parse_override(override)
        set_value(values, key, value)
        origin |= dict.fromkeys(leaf_keys(value, key), COMMAND_LINE)
    return build_config(values, origin)


def override_keys(overrides: Sequence[str]) -> frozenset[str]:
    """The dotted keys that `section.key=value` overrides set."""
    return frozenset(leaf for key, value in map(parse_override, overrides) for leaf in leaf_keys(value, key))


def run_dir_of(path: str | Path, overrides: Sequence[str] = ()) -> str | None:
    """The run directory of a configuration whose other values may be invalid; None if it cannot be determined."""
    named = [override.partition("=")[2] for override in overrides if override.startswith("run_dir=")]
    try:
        value = named[-1] if named else _read_yaml(path).get("run_dir")
        return expand(value) if isinstance(value, str) else None
    except (ConfigError, ValueError):
        return None


def build_config(values: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Config:
    """Applies the preset to plain values, checks them, and returns the configuration.

    Args:
        values: Sections of values, as parsed from a YAML file.
        origin: Origin of each dotted key's value, for messages; "" is the origin of the whole configuration.

    Raises:
        ConfigError: See :func:`load_config`.
    """
    origin = dict(origin) if origin is not None else dict.fromkeys(leaf_keys(values), "configuration")
    preset = values.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(_message(origin, ("preset",), preset, f"unknown preset{_hint(str(preset), PRESETS)}"))
        origin = dict.fromkeys(leaf_keys(PRESETS[preset]), f"preset {preset}") | origin
        values = merged(PRESETS[preset], values)
    try:
        config = Config.model_validate(dict(values))
    except ValidationError as error:
        by_key: dict[_Key, list[Any]] = {}
        for item in error.errors():
            by_key.setdefault(_written_key(item["loc"]), []).append(item)
        problems = [_message(origin, key, _lookup(values, key), _reason(key, items)) for key, items in by_key.items()]
        raise ConfigError("\n".join(problems)) from None
    broken = [
        _message(origin, tuple(key.split(".")), _lookup(config.model_dump(), key.split(".")), reason)
        for key, reason in check_fields(config)
    ]
    if broken:
        raise ConfigError("\n".join(broken))
    return config


def to_yaml(config: Config) -> str:
    """The configuration as YAML, with all defaults written out. :func:`load_config` can read it back."""
    return yaml.dump(config.model_dump(), Dumper=strict_yaml.Dumper, sort_keys=False, allow_unicode=True)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of bounded size whose content is a mapping, such as a configuration; an empty one gives {}.

    Raises:
        ConfigError: The file cannot be read, or has another content.
    """
    try:
        with Path(expand(path) if isinstance(path, str) else path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: a configuration has at most {_MAX_BYTES:,} bytes; is this a configuration file?")
    try:
        values = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, not {_show(values)}")
    return values


def fill_sections(values: dict[str, Any], origin: str) -> None:
    """Replaces empty sections in `values`, such as `eval:`, which have all defaults, by empty mappings.

    Raises:
        ConfigError: A section has a plain value. The message begins with `origin`.
    """
    for key, value in values.items():
        if _section((key,)) is None:
            continue
        if value is None:
            values[key] = {}
        elif not isinstance(value, dict):
            raise ConfigError(f"{origin}: {key} = {_show(value)}: {_IS_A_SECTION}")


def _read_yaml(path: str | Path) -> dict[str, Any]:
    values = read_mapping(path)
    fill_sections(values, str(path))
    return values


def parse_override(override: str) -> tuple[_Key, Any]:
    """Splits `section.key=value` into (key, value).

    Raises:
        ConfigError: The override does not have this form, or its value is not valid YAML.
    """
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.split("."))
    if not equals or not all(key):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise ConfigError(
            f"{COMMAND_LINE}: the value of {dotted} is not UTF-8: {shown}. To use a file of this name, give its "
            "directory, or a glob with * in place of these bytes"
        ) from None
    if text.startswith("*"):
        return key, text  # a glob, not a YAML alias: an override has no anchors
    try:
        return key, strict_yaml.load(text)
    except yaml.YAMLError as error:
        hint = ""
        if not isinstance(error, yaml.constructor.ConstructorError | yaml.composer.ComposerError):
            hint = f"\nQuote text with special characters, and the whole argument for the shell: '{dotted}=\"...\"'"
        raise ConfigError(f"{COMMAND_LINE}: the value of {dotted}, {_yaml_problem(error)}{hint}") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"not valid YAML: {error}"
    mark = error.problem_mark
    problem = ": ".join(filter(None, (error.context, error.problem)))
    if error.context == "while scanning an alias" or (error.problem or "").startswith("found undefined alias"):
        problem += "; text that begins with * needs quotes"
    return f"line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {problem}\n{mark.get_snippet() or ''}"


def set_value(values: dict[str, Any], key: _Key, value: Any, origin: str = COMMAND_LINE) -> None:
    """Stores an override's value in `values`. A mapping sets keys of a section, whose other keys are left unchanged.

    Raises:
        ConfigError: The key names something below a plain value, or a whole section is set to a plain value. The
            message begins with `origin`.
    """
    shown = f"{origin}: {'.'.join(key)} = {_show(value)}"
    for depth in range(1, len(key)):
        if _is_field(key[:depth]) and _section(key[:depth]) is None and not _takes_keys(key[:depth]):
            raise ConfigError(f"{shown}: {'.'.join(key[:depth])} is a value, not a section")
        below = values.get(key[depth - 1])
        if not isinstance(below, dict):
            below = values[key[depth - 1]] = {}
        values = below
    if _section(key) is not None:
        if not isinstance(value, dict):
            raise ConfigError(f"{shown}: {_IS_A_SECTION}")
        value = {**values.get(key[-1], {}), **value}
    values[key[-1]] = value


def _lookup(values: Any, key: Sequence[str]) -> Any:
    for part in key:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two nested mappings; where both have a value, the value of `top` is used."""
    result = {key: merged(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in top.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return result


def _section(key: Sequence[str]) -> type[BaseModel] | None:
    """The pydantic model of section `key` (of the whole configuration if empty), or None if it is not a section."""
    model: type[BaseModel] = Config
    for part in key:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return None
        model = field.annotation
    return model


def _is_field(key: _Key) -> bool:
    parent = _section(key[:-1])
    return parent is not None and key[-1] in parent.model_fields


def _takes_keys(key: _Key) -> bool:
    """Whether a field's value is a mapping with arbitrary keys, such as `parallel.deepspeed`."""
    parent = _section(key[:-1])
    return parent is not None and get_origin(parent.model_fields[key[-1]].annotation) is dict


def _written_key(loc: Sequence[int | str]) -> _Key:
    """The key as the user wrote it: pydantic's location without union members and list indices."""
    key = tuple(map(str, loc))
    return next((key[:n] for n in range(1, len(key) + 1) if _section(key[:n]) is None), key)


def _reason(key: _Key, items: Sequence[Mapping[str, Any]]) -> str:
    """Says what is wrong with the value of `key`, from the errors that pydantic reports for it."""
    if len(items) > 1:  # pydantic reports one error per member of a union
        members = dict.fromkeys(str(item["loc"][len(key)]) for item in items)
        return f"should be {' or '.join(_UNION_MEMBERS.get(member, member) for member in members)}"
    item = items[0]
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"unknown key{_key_hint(key)}"
    if kind in {"model_type", "dict_type"}:
        return _IS_A_SECTION
    if kind == "value_error":
        return str(item["ctx"]["error"])
    reason = "should be " + _EXPECTED[kind] if kind in _EXPECTED else re.sub("^Input ", "", item["msg"])
    if kind == "string_type" and isinstance(value, bool | int | float):
        reason += "; put it in quotes"
    elif kind == "int_type" and isinstance(value, float) and value.is_integer():
        reason += f"; write {int(value)}"
    elif kind == "literal_error":
        close = difflib.get_close_matches(str(value), re.findall(r"'(\w+)'", reason), n=1)
        reason += f"; did you mean {close[0]!r}?" if close else ""
    return reason


def _key_hint(key: _Key) -> str:
    """Suggests keys that are similar to the unknown `key`, or lists the keys of its section."""
    section_model = _section(key[:-1])
    if section_model is None:
        return ""
    prefix = "".join(f"{part}." for part in key[:-1])
    in_section = {prefix + name: name for name in section_model.model_fields}
    everywhere = {name: name for name in Config.model_fields}
    for section, field in Config.model_fields.items():
        everywhere |= {f"{section}.{name}": name for name in getattr(field.annotation, "model_fields", ())}
    suggestions = [dotted for dotted, name in everywhere.items() if name == key[-1]]
    for choices, cutoff in ((in_section, 0.6), (everywhere, 0.75)):
        if not suggestions:
            close = difflib.get_close_matches(key[-1], list(choices.values()), n=1, cutoff=cutoff)
            suggestions = [dotted for dotted, name in choices.items() if name in close]
    if suggestions:
        return f"; did you mean {' or '.join(suggestions)}?"
    return f"; valid keys: {', '.join(sorted(in_section.values()))}"


def _hint(word: str, choices: Collection[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(sorted(choices))}"


def _message(origin: Mapping[str, str], key: _Key, value: Any, reason: str) -> str:
    dotted = ".".join(key)
    above = [".".join(key[:n]) for n in range(len(key), 0, -1)]
    below = [known for known in origin if known.startswith(f"{dotted}.")]
    source = next((origin[known] for known in (*above, *below) if known in origin), None)
    if source is None:  # the value is a default
        return f"{origin.get('', 'configuration')}: {dotted} = {_show(value)} (default): {reason}"
    return f"{source}: {dotted} = {_show(value)}: {reason}"


def _show(value: Any) -> str:
    """Formats a value as a user would write it in YAML, shortened to 100 characters."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python refuses to print these
        return f"a number of {value.bit_length():,} bits"
    value = list(value) if isinstance(value, tuple) else value
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
