"""The layout of optimizer states (no torch): a parameter's states, their form and bytes, and which parameters decay.

The form of a state depends only on the whole parameter, never on how it is sharded. A parameter of `QUANTIZED_FROM` or
more values is quantized in groups: within each row of a matrix, whose last group may be shorter; over the whole of a
vector, from its beginning. Smaller parameters have float32 states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.projected.settings import (
    NORM,
    PROJECTION,
    ProjectedOptim,
    low_shape,
    projection_shape,
    projects,
)

STATE_NAMES: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": (),
    "adafactor": (),
}
"""Optimizer states that have one value per value of the parameter, by optimizer name."""

UNSIGNED = ("exp_avg_sq",)
"""States that are never negative."""

MOMENTUM = "momentum_buffer"
"""The only state of `optim.factors`: muon and spectron, under torch's name of it."""

MASTER = "master"
"""Name of the state that holds a parameter's fp32 master weights."""

QUANTIZED_FROM = 4096
"""Number of values of the smallest parameter whose states are quantized."""

GROUP_SIZES = {8: 256, 4: 128}
"""Number of values that share a scale, by `optim.state_bits`."""


def decays(name: str, optim: OptimConfig) -> bool:
    """Returns whether weight decay applies to a named parameter: never to norms and embeddings."""
    return optim.weight_decay > 0 and "norm" not in name and "embed_tokens" not in name


def is_orthogonalized(name: str, optim: OptimConfig) -> bool:
    """Returns whether `optim.factors` updates a named parameter, instead of the optimizer of all others.

    muon updates every matrix of a linear layer of attention and MLP: B, A and dense weights. spectron updates pairs of
    B and A only.
    """
    layer, _, last = name.rpartition(".")
    if optim.factors == "muon" and last == "weight":
        return layer.endswith("_proj")
    return optim.factors != "adam" and last in ("B", "A")


GROUP_KINDS = tuple((orthogonalized, decay) for orthogonalized in (False, True) for decay in (True, False))
"""Kinds of parameter groups, in their order: (whether `optim.factors` updates them, whether they decay)."""


def state_names(name: str, optim: OptimConfig) -> tuple[str, ...]:
    """Returns the states of a named parameter that have one value per value of it."""
    return (MOMENTUM,) if is_orthogonalized(name, optim) else STATE_NAMES[optim.name]


def is_quantized(shape: tuple[int, ...], state_bits: int) -> bool:
    """Returns whether the states of a parameter of this shape are quantized."""
    return state_bits in GROUP_SIZES and math.prod(shape) >= QUANTIZED_FROM


def shared_groups(part: TensorRange, state_bits: int) -> list[int]:
    """Returns the numbers of the quantized groups that lie on both sides of a border between ranks."""
    if not is_quantized(part.shape, state_bits):
        return []
    size = GROUP_SIZES[state_bits]
    return sorted({border // size for border in part.borders if border % size and border < math.prod(part.shape)})


@dataclass(frozen=True)
class UpdateChunk:
    """Consecutive values of a range of a parameter that are updated at a time.

    Attributes:
        start, stop: Their positions, counted from the first value of the parameter's range.
        rows: Number of rows, all of the same width.
        left: Number of values of the first group that lie before the parameter's range.
        first_group, last_group: Quantization groups (the last one exclusive), counted from the range's first group.
    """

    start: int
    stop: int
    rows: int
    left: int
    first_group: int
    last_group: int


def update_chunks(part: TensorRange, group_size: int, most: int) -> Iterator[UpdateChunk]:
    """Yields chunks that cover a range and end between groups, of at most `most` values but at least a row or group.

    A range of a matrix may begin and end within a row if `group_size` is 1, so that there are no groups.
    """
    if part.is_matrix and part.start % part.row == 0 and part.count % part.row == 0:
        row, rows = part.row, part.count // part.row
        per_chunk, groups = max(1, most // row), -(-row // group_size)
        for first in range(0, rows, per_chunk):
            last = min(rows, first + per_chunk)
            yield UpdateChunk(first * row, last * row, last - first, 0, first * groups, last * groups)
        return
    size, offset = max(1, most // group_size) * group_size, part.start % group_size
    for first in range(0, offset + part.count, size):
        last = min(offset + part.count, first + size)
        left = offset if first == 0 else 0
        yield UpdateChunk(max(0, first - offset), last - offset, 1, left, first // group_size, -(-last // group_size))


@dataclass(frozen=True)
class StoredState:
    """A tensor of optimizer state, as checkpoints store it.

    Attributes:
        range: The part of it that belongs to a range of the parameter. Its name is that of the state: "exp_avg", or
            "exp_avg.codes" (one code per byte) and "exp_avg.scales" if quantized.
        nbytes: Bytes of this part in memory.
        skip: How many of its values, from the first on, another rank saves: a scale is saved with its group's first
            value.
    """

    range: TensorRange
    nbytes: int
    skip: int = 0


def stored_states(part: TensorRange, optim: OptimConfig, value_bytes: int) -> list[StoredState]:
    """Returns every tensor that an optimizer keeps for a range of a parameter after its first update.

    Args:
        part: The range that this rank holds.
        optim: Optimizer settings.
        value_bytes: Bytes of one value of the parameter.
    """
    if optim.name == "adafactor":
        return adafactor_states(part, value_bytes)
    if projects(optim, part.name):
        return _projected_states(part, optim, value_bytes)
    states = []
    for key in state_names(part.name, optim):
        if is_quantized(part.shape, optim.state_bits):
            states += _quantized_states(key, part, optim.state_bits)
        else:
            width = value_bytes if optim.state_bits == 16 else 4
            states.append(StoredState(replace(part, name=key), width * part.count))
    if has_masters(optim, value_bytes):
        states.append(StoredState(replace(part, name=MASTER), 4 * part.count))
    return states


def has_masters(optim: OptimConfig, value_bytes: int) -> bool:
    """Returns whether fp32 master weights are kept; parameters of four-byte values need none."""
    return optim.master_weights and value_bytes < 4


def needs_low_bit(optim: OptimConfig, value_bytes: int) -> bool:
    """Returns whether parameters of this many bytes per value need :class:`LowBitAdam` instead of torch's Adam."""
    if optim.name not in ("adamw", "adam"):
        return False
    rounds = optim.stochastic_rounding and value_bytes < 4
    wider = optim.state_bits == 32 and value_bytes < 4
    return optim.state_bits in GROUP_SIZES or wider or rounds or has_masters(optim, value_bytes)


def state_bytes(part: TensorRange, optim: OptimConfig, value_bytes: int) -> int:
    """Returns the bytes of a range's optimizer state, without the update counter."""
    return sum(state.nbytes for state in stored_states(part, optim, value_bytes))


def code_bytes(part: TensorRange, state_bits: int) -> int:
    """Returns the bytes of a range's codes. Rows of a matrix begin with a new byte; ranks may share one of a vector."""
    if state_bits == 8:
        return part.count
    if part.is_matrix:
        return part.count // part.row * -(-part.row // 2)
    return -(-part.stop // 2) - part.start // 2


def _quantized_states(key: str, part: TensorRange, state_bits: int) -> list[StoredState]:
    size = GROUP_SIZES[state_bits]
    if part.is_matrix:
        groups = -(-part.row // size)
        shape, first = (*part.shape[:-1], groups), part.start // part.row * groups
        count, skip = part.count // part.row * groups, 0
    else:
        shape, first = (-(-part.shape[0] // size),), part.start // size
        count = -(-part.stop // size) - first if part.count else 0
        skip = min(count, int(part.start % size > 0))
    return [
        StoredState(replace(part, name=f"{key}.codes"), code_bytes(part, state_bits)),
        StoredState(TensorRange(f"{key}.scales", shape, first, count), 4 * count, skip),
    ]


def adafactor_states(part: TensorRange, value_bytes: int) -> list[StoredState]:
    """Returns the states of torch's Adafactor, which supports whole parameters only."""
    shapes = {"variance": part.shape}
    if part.is_matrix:
        shapes = {"row_var": (*part.shape[:-1], 1), "col_var": (*part.shape[:-2], 1, part.row)}
    states = [TensorRange.whole(key, shape) for key, shape in shapes.items()]
    return [StoredState(state, value_bytes * state.count) for state in states]


def _projected_states(part: TensorRange, optim: ProjectedOptim, value_bytes: int) -> list[StoredState]:
    """Returns the states of :class:`ProjectedAdam`, which supports whole matrices only."""
    low = TensorRange.whole("low", low_shape(part.shape, optim.rank))
    moments = stored_states(low, optim, value_bytes)
    if optim.method == "galore":
        projection = TensorRange.whole(PROJECTION, projection_shape(part.shape, optim.rank))
        return [*moments, StoredState(projection, value_bytes * projection.count)]
    return [*moments, StoredState(TensorRange.whole(NORM, (1,)), 4)]
