"""What optimizers keep for a parameter (no torch): which states, in which form and how many bytes, and which
parameters decay.

The form of a state depends on the whole parameter alone, never on how it is dealt to ranks. A parameter of
`QUANTIZED_FROM` values or more is quantized in blocks: within each row of a matrix, whose last block may be
short; over the whole of a vector, from its beginning. Smaller ones keep float32.
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
"""Optimizer states that have one value for each of the parameter's, by optimizer name."""

MASTER = "master"
"""The state that is a parameter's fp32 copy."""

QUANTIZED_FROM = 4096
"""Values of the smallest parameter whose states are quantized."""

BLOCKS = {8: 256, 4: 128}
"""Values that share a scale, by `optim.state_bits`."""


def decays(name: str, optim: OptimConfig) -> bool:
    """Whether weight decay applies to a named parameter: never to norms and embeddings."""
    return optim.weight_decay > 0 and "norm" not in name and "embed_tokens" not in name


@dataclass(frozen=True)
class Place:
    """A contiguous part of a named parameter, flattened: what one rank holds of it.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        start: Where the part begins.
        count: Values in it. Parts of matrices are whole rows.
        borders: Where other parts begin; of vectors only, because blocks lie within the rows of matrices.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    borders: tuple[int, ...] = ()

    @property
    def row(self) -> int:
        """Values of a row; a vector is one row."""
        return self.shape[-1]

    @property
    def is_matrix(self) -> bool:
        """Whether it has several rows, or could have."""
        return len(self.shape) > 1

    @property
    def stop(self) -> int:
        """Where the part ends."""
        return self.start + self.count


def whole(name: str, shape: tuple[int, ...]) -> Place:
    """All of a parameter."""
    return Place(name, shape, 0, math.prod(shape))


def is_quantized(shape: tuple[int, ...], state_bits: int) -> bool:
    """Whether the states of a parameter of this shape are quantized."""
    return state_bits in BLOCKS and math.prod(shape) >= QUANTIZED_FROM


def shared_blocks(place: Place, state_bits: int) -> list[int]:
    """Numbers of the quantized blocks that lie on both sides of a border between ranks."""
    if not is_quantized(place.shape, state_bits):
        return []
    block = BLOCKS[state_bits]
    return sorted({border // block for border in place.borders if border % block and border < math.prod(place.shape)})


@dataclass(frozen=True)
class Span:
    """A stretch of a place's values that is updated at a time.

    Attributes:
        start, stop: The stretch, counted from the place's first value.
        rows: Rows in it, each of the same width.
        left: Values of its first block that lie before the place.
        first_block, last_block: Its blocks (the last one exclusive), counted from the place's first.
    """

    start: int
    stop: int
    rows: int
    left: int
    first_block: int
    last_block: int


def spans(place: Place, block: int, most: int) -> Iterator[Span]:
    """Cuts a place between blocks into spans of at most `most` values, or one row if that is longer, or a block."""
    if place.is_matrix:
        row, rows = place.row, place.count // place.row
        per_span, blocks = max(1, most // row), -(-row // block)
        for first in range(0, rows, per_span):
            last = min(rows, first + per_span)
            yield Span(first * row, last * row, last - first, 0, first * blocks, last * blocks)
        return
    size, offset = max(1, most // block) * block, place.start % block
    for first in range(0, offset + place.count, size):
        last = min(offset + place.count, first + size)
        left = offset if first == 0 else 0
        yield Span(max(0, first - offset), last - offset, 1, left, first // block, -(-last // block))


@dataclass(frozen=True)
class Stored:
    """A tensor of optimizer state, flattened, as checkpoints hold it.

    Attributes:
        key: Name of the state: "exp_avg", or "exp_avg.codes" (one a byte) and "exp_avg.scales" if quantized.
        shape: Of the whole tensor, on all ranks together.
        start: Where this place's values begin in it.
        count: Values of it that this place needs.
        skip: Leading ones of them that another rank saves: a scale is saved with its block's first value.
        nbytes: Bytes in memory.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    count: int
    skip: int
    nbytes: int


def stored_states(place: Place, optim: OptimConfig, value_bytes: int) -> list[Stored]:
    """Every tensor that an optimizer keeps for a place after its first update.

    Args:
        place: What is held of the parameter.
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
    """Whether fp32 copies are kept; parameters of four bytes are their own."""
    return optim.master_weights and value_bytes < 4


def needs_low_bit(optim: OptimConfig, value_bytes: int) -> bool:
    """Whether torch's own Adam will not do, for parameters of this many bytes a value."""
    if optim.name not in ("adamw", "adam"):
        return False
    rounds = optim.stochastic_rounding and value_bytes < 4
    wider = optim.state_bits == 32 and value_bytes < 4
    return optim.state_bits in BLOCKS or wider or rounds or has_masters(optim, value_bytes)


def state_bytes(place: Place, optim: OptimConfig, value_bytes: int) -> int:
    """Bytes of a place's optimizer state; the counter of updates is not among them."""
    return sum(state.nbytes for state in stored_states(place, optim, value_bytes))


def code_bytes(place: Place, state_bits: int) -> int:
    """Bytes of a place's codes. Rows of a matrix, and a vector, begin with a new byte; ranks may share one of these."""
    if state_bits == 8:
        return place.count
    if place.is_matrix:
        return place.count // place.row * -(-place.row // 2)
    return -(-place.stop // 2) - place.start // 2


def _quantized_states(key: str, place: Place, state_bits: int) -> list[Stored]:
    block = BLOCKS[state_bits]
    if place.is_matrix:
        blocks = -(-place.row // block)
        shape, first = (*place.shape[:-1], blocks), place.start // place.row * blocks
        count, skip = place.count // place.row * blocks, 0
    else:
        shape, first = (-(-place.shape[0] // block),), place.start // block
        count = -(-place.stop // block) - first if place.count else 0
        skip = min(count, int(place.start % block > 0))
    return [
        Stored(f"{key}.codes", place.shape, place.start, place.count, 0, code_bytes(place, state_bits)),
        Stored(f"{key}.scales", shape, first, count, skip, 4 * count),
    ]


def adafactor_states(place: Place, value_bytes: int) -> list[Stored]:
    """The states of torch's Adafactor, which has them of whole parameters only."""
    shapes = {"variance": place.shape}
    if place.is_matrix:
        shapes = {"row_var": (*place.shape[:-1], 1), "col_var": (*place.shape[:-2], 1, place.row)}
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    return [Stored(key, shapes[key], 0, size, 0, value_bytes * size) for key, size in sizes.items()]
