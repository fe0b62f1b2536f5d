"""The layout of optimizer states (no torch): a parameter's states, their form and bytes, and which parameters decay.

The form of a state depends only on the whole parameter, never on how it is sharded. A parameter of `QUANTIZED_FROM` or
more values is quantized in groups: within each row of a matrix, whose last group may be shorter; over the whole of a
vector, from its beginning. Smaller parameters have float32 states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sltrain_dist.config.schema import OptimConfig

STATE_NAMES: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": (),
    "adafactor": (),
}
"""Optimizer states that have one value per value of the parameter, by optimizer name."""

MASTER = "master"
"""Name of the state that holds a parameter's fp32 master weights."""

QUANTIZED_FROM = 4096
"""Number of values of the smallest parameter whose states are quantized."""

GROUP_SIZES = {8: 256, 4: 128}
"""Number of values that share a scale, by `optim.state_bits`."""


def decays(name: str, optim: OptimConfig) -> bool:
    """Returns whether weight decay applies to a named parameter: never to norms and embeddings."""
    return optim.weight_decay > 0 and "norm" not in name and "embed_tokens" not in name


@dataclass(frozen=True)
class Place:
    """A contiguous range of a named, flattened parameter: the part that one rank holds.

    Attributes:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        start: Position of the first value.
        count: Number of values. Parts of matrices are whole rows.
        borders: Positions where the other ranks' parts begin. Only for vectors: the groups of matrices lie within rows.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    borders: tuple[int, ...] = ()

    @property
    def row(self) -> int:
        """Number of values in a row; a vector is one row."""
        return self.shape[-1]

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter has two or more dimensions."""
        return len(self.shape) > 1

    @property
    def stop(self) -> int:
        """Position after the last value."""
        return self.start + self.count


def whole(name: str, shape: tuple[int, ...]) -> Place:
    """Returns the place of a whole parameter."""
    return Place(name, shape, 0, math.prod(shape))


def is_quantized(shape: tuple[int, ...], state_bits: int) -> bool:
    """Returns whether the states of a parameter of this shape are quantized."""
    return state_bits in GROUP_SIZES and math.prod(shape) >= QUANTIZED_FROM


def shared_groups(place: Place, state_bits: int) -> list[int]:
    """Returns the numbers of the quantized groups that lie on both sides of a border between ranks."""
    if not is_quantized(place.shape, state_bits):
        return []
    size = GROUP_SIZES[state_bits]
    return sorted({border // size for border in place.borders if border % size and border < math.prod(place.shape)})


@dataclass(frozen=True)
class Span:
    """A range of a place's values that is updated at a time.

    Attributes:
        start, stop: The range, counted from the place's first value.
        rows: Number of rows in it, all of the same width.
        left: Number of values of its first group that lie before the place.
        first_group, last_group: Its groups (the last one exclusive), counted from the place's first group.
    """

    start: int
    stop: int
    rows: int
    left: int
    first_group: int
    last_group: int


def spans(place: Place, group_size: int, most: int) -> Iterator[Span]:
    """Yields spans that cover a place and end between groups, of at most `most` values but at least a row or group."""
    if place.is_matrix:
        row, rows = place.row, place.count // place.row
        per_span, groups = max(1, most // row), -(-row // group_size)
        for first in range(0, rows, per_span):
            last = min(rows, first + per_span)
            yield Span(first * row, last * row, last - first, 0, first * groups, last * groups)
        return
    size, offset = max(1, most // group_size) * group_size, place.start % group_size
    for first in range(0, offset + place.count, size):
        last = min(offset + place.count, first + size)
        left = offset if first == 0 else 0
        yield Span(max(0, first - offset), last - offset, 1, left, first // group_size, -(-last // group_size))


@dataclass(frozen=True)
class Stored:
    """A flattened tensor of optimizer state, as checkpoints store it.

    Attributes:
        key: Name of the state: "exp_avg", or "exp_avg.codes" (one code per byte) and "exp_avg.scales" if quantized.
        shape: Shape of the whole tensor, on all ranks together.
        start: Position in the whole tensor where this place's values begin.
        count: Number of its values that this place needs.
        skip: How many of them, from the first on, another rank saves: a scale is saved with its group's first value.
        nbytes: Bytes in memory.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    count: int
    skip: int
    nbytes: int


def stored_states(place: Place, optim: OptimConfig, value_bytes: int) -> list[Stored]:
    """Returns every tensor that an optimizer keeps for a place after its first update.

    Args:
        place: The part of the parameter that this rank holds.
        optim: Optimizer settings.
        value_bytes: Bytes of one value of the parameter.
    """
    if optim.name == "adafactor":
        return adafactor_states(place, value_bytes)
    states = []
    for key in STATE_NAMES[optim.name]:
        if is_quantized(place.shape, optim.state_bits):
            states += _quantized_states(key, place, optim.state_bits)
        else:
            width = value_bytes if optim.state_bits == 16 else 4
            states.append(Stored(key, place.shape, place.start, place.count, 0, width * place.count))
    if has_masters(optim, value_bytes):
        states.append(Stored(MASTER, place.shape, place.start, place.count, 0, 4 * place.count))
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


def state_bytes(place: Place, optim: OptimConfig, value_bytes: int) -> int:
    """Returns the bytes of a place's optimizer state, without the update counter."""
    return sum(state.nbytes for state in stored_states(place, optim, value_bytes))


def code_bytes(place: Place, state_bits: int) -> int:
    """Returns the bytes of a place's codes. Rows of a matrix begin with a new byte; ranks may share one of a vector."""
    if state_bits == 8:
        return place.count
    if place.is_matrix:
        return place.count // place.row * -(-place.row // 2)
    return -(-place.stop // 2) - place.start // 2


def _quantized_states(key: str, place: Place, state_bits: int) -> list[Stored]:
    size = GROUP_SIZES[state_bits]
    if place.is_matrix:
        groups = -(-place.row // size)
        shape, first = (*place.shape[:-1], groups), place.start // place.row * groups
        count, skip = place.count // place.row * groups, 0
    else:
        shape, first = (-(-place.shape[0] // size),), place.start // size
        count = -(-place.stop // size) - first if place.count else 0
        skip = min(count, int(place.start % size > 0))
    return [
        Stored(f"{key}.codes", place.shape, place.start, place.count, 0, code_bytes(place, state_bits)),
        Stored(f"{key}.scales", shape, first, count, skip, 4 * count),
    ]


def adafactor_states(place: Place, value_bytes: int) -> list[Stored]:
    """Returns the states of torch's Adafactor, which supports whole parameters only."""
    shapes = {"variance": place.shape}
    if place.is_matrix:
        shapes = {"row_var": (*place.shape[:-1], 1), "col_var": (*place.shape[:-2], 1, place.row)}
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    return [Stored(key, shapes[key], 0, size, 0, value_bytes * size) for key, size in sizes.items()]
