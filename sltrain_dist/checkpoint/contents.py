"""The contents of a checkpoint's files: ranges of tensors, and the run's state. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, RootModel, ValidationError
from safetensors import SafetensorError, safe_open

from sltrain_dist.checkpoint.manifest import CONFIG, STATE, changed_file, read_manifest
from sltrain_dist.config.load import load_config
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import CheckpointError, ConfigError
from sltrain_dist.files import first_problem, open_regular, parse_model, read_model
from sltrain_dist.models.count import is_frozen, is_int8, parameter_shapes
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.projected.settings import optimizer_settings
from sltrain_dist.optim.state_layout import stored_states

_Shapes = RootModel[dict[str, list[Annotated[int, Field(strict=True, ge=0, lt=1 << 48)]]]]
_Object = RootModel[dict[str, Any]]
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_CODES = frozenset({"I8", "U8"})


class _RunState(BaseModel):
    """The part of state.json that is the same for all runs."""

    counters: dict[str, int | float | dict[str, Any] | None]
    data: dict[str, Any]
    rng: list[dict[str, str]]
    supports: str


class RangeInFile(NamedTuple):
    """A saved range of a flattened tensor."""

    start: int
    stop: int
    file: int
    """Index of its tensor file."""
    key: str
    """Key of the range in that file."""


@dataclass
class SavedTensor:
    """A tensor in a checkpoint, made of the ranges that the ranks have saved."""

    shape: tuple[int, ...]
    dtype: str
    """Data type by safetensors' name."""
    ranges: list[RangeInFile] = field(default_factory=list)
    """Sorted ranges that cover every element exactly once."""


class TensorFiles:
    """The opened tensor files of a checkpoint.

    Args:
        directory: The checkpoint.
        names: Its tensor files, as listed in its manifest.
        framework: safetensors' name of the library whose tensors are returned.

    Attributes:
        files: safetensors' handles, in the order of `names`.
        tensors: Their tensors by name.

    Raises:
        CheckpointError: A file cannot be read, or the ranges of a tensor do not cover it exactly.
    """

    def __init__(self, directory: Path, names: Sequence[str], framework: Literal["pt", "numpy"]) -> None:
        self.files: list[Any] = []
        self.tensors: dict[str, SavedTensor] = {}
        for name in names:
            path = directory / name
            try:
                open_regular(path).close()
                self._add(safe_open(path, framework=framework))
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        for name, tensor in self.tensors.items():
            tensor.ranges.sort()
            if gap := _gap(tensor):
                raise CheckpointError(f"{directory} is damaged: {gap} of {name}")

    def _add(self, file: Any) -> None:
        metadata = file.metadata() or {}
        shapes = parse_model(metadata.get("shapes", ""), _Shapes).root
        for name, shape in shapes.items():
            tensor = self.tensors.setdefault(name, SavedTensor(tuple(shape), ""))
            if tensor.shape != tuple(shape):
                raise ValueError(f"{name} has the shape {shape} here and {list(tensor.shape)} in another file")
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name, _, start = key.rpartition("@")
            piece = file.get_slice(key)
            shape, dtype = piece.get_shape(), str(piece.get_dtype())
            if name not in shapes or not (start.isascii() and start.isdigit() and len(start) < 18) or len(shape) != 1:
                raise ValueError(f"{key!r} is not a range of a tensor with a known shape")
            tensor = self.tensors[name]
            tensor.dtype = tensor.dtype or dtype
            if tensor.dtype != dtype:
                raise ValueError(f"{name} has the type {dtype} here and {tensor.dtype} elsewhere")
            tensor.ranges.append(RangeInFile(int(start), int(start) + shape[0], len(self.files), key))
        self.files.append(file)


def _gap(tensor: SavedTensor) -> str | None:
    """Says which elements are not covered exactly once; None if all are."""
    reached = 0
    for each in tensor.ranges:
        if each.start != reached:
            what = "no range covers" if each.start > reached else "two ranges cover"
            return f"{what} elements {min(reached, each.start)} to {max(reached, each.start) - 1}"
        reached = each.stop
    numel = prod(tensor.shape)
    return None if reached == numel else f"{reached} elements are saved instead of {numel},"


def read_state(directory: Path) -> dict[str, Any]:
    """Reads the run's state, state.json, of a checkpoint.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        return read_model(directory / STATE, _Object).root
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / STATE} cannot be read: {error}") from None


def damage(directory: Path) -> str | None:
    """Says which files of a checkpoint differ from its manifest or have invalid contents; None if all are fine."""
    return changed_file(directory) or content_problem(directory)


def content_problem(directory: Path) -> str | None:
    """Says what is invalid in the contents of files that match their manifest, without reading tensors; or None."""
    try:
        state, step = read_state(directory), read_manifest(directory).step
        tensors = TensorFiles(directory, read_manifest(directory).tensor_files, "numpy").tensors
        config = load_config(directory / CONFIG)
    except CheckpointError as error:
        return str(error)
    except ConfigError:  # perhaps of another version: the tensors can be read, and resume and export report it
        return None
    problem = _wrong_tensor(config, tensors) or _wrong_state(state, step)
    return f"{directory} is damaged: {problem}" if problem else None


def _wrong_state(state: Mapping[str, Any], step: int) -> str | None:
    """Says what is missing in the run's state, or that its step differs from the manifest's; None if it is valid."""
    try:
        counters = _RunState.model_validate(state).counters
    except ValidationError as error:
        return f"{STATE}: {first_problem(error)}"
    return None if counters.get("step") == step else f"{STATE} is of step {counters.get('step')} instead of {step}"


def _wrong_tensor(config: Config, tensors: Mapping[str, SavedTensor]) -> str | None:
    """Names the first parameter or optimizer state that is missing or has a wrong shape or type; None if none is."""
    for name, shape, dtypes in _expected(config):
        if name not in tensors or (shape is not None and tensors[name].shape != shape):
            return name + (f" of shape {shape}" if shape else "") + " is missing"
        if tensors[name].dtype not in dtypes:
            return f"{name} has the type {tensors[name].dtype}"
    return None


def _expected(config: Config) -> Iterator[tuple[str, tuple[int, ...] | None, frozenset[str]]]:
    """Yields (name, shape or None for any, allowed types) of every tensor that a run of this configuration saves."""
    optim = optimizer_settings(config)
    value_bytes = 2 if config.train.dtype == "bf16" else 4
    for parameter, shape in parameter_shapes(config.model, config.reparam):
        if is_int8(parameter, config.reparam):
            yield f"model.{parameter}.codes", shape, _CODES
            yield f"model.{parameter}.scales", None, _FLOATS
        else:
            yield f"model.{parameter}", shape, _FLOATS
        if is_frozen(parameter, config.reparam):
            continue
        for stored in stored_states(TensorRange.whole(parameter, shape), optim, value_bytes):
            name, kinds = stored.range.name, _CODES if stored.range.name.endswith("codes") else _FLOATS
            yield f"optim.{parameter}.{name}", stored.range.shape, kinds
