"""What an optimizer's step takes for a moment (no torch): optim/low_bit.py, and torch's optimizers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.optim.state_layout import BLOCKS, Place, has_masters, is_quantized, needs_low_bit, spans, whole


@dataclass(frozen=True)
class StepMemory:
    """Bytes that live within a step of one parameter, beside parameter, gradient and states.

    Attributes:
        kind: low_bit: optim/low_bit.py makes the step. adafactor: torch's. in place: torch's others, without memory.
        state_bits: Of each state.
        narrow: Whether parameters have two bytes a value.
        masters: Whether there are fp32 copies.
        decays: Whether decay is taken from the values.
        rounds: Whether they are rounded stochastically.
        span: Values that are updated at a time.
        int8: Whether the parameter is an int8 weight.
    """

    kind: Literal["low_bit", "adafactor", "in place"]
    state_bits: int
    narrow: bool
    masters: bool
    decays: bool
    rounds: bool
    span: int
    int8: bool = False

    @staticmethod
    def of_run(optim: OptimConfig, width: int, span: int, *, int8: bool) -> StepMemory:
        """Of a run whose parameters have `width` bytes a value; `int8`: some are int8 weights.

        Those need :class:`LowBitAdam`, which then updates the others too (optim/factory.py).
        """
        kind: Literal["low_bit", "adafactor", "in place"] = "adafactor" if optim.name == "adafactor" else "in place"
        return StepMemory(
            "low_bit" if int8 or needs_low_bit(optim, width) else kind,
            optim.state_bits,
            width < 4,
            has_masters(optim, width),
            optim.weight_decay > 0 and optim.name == "adamw",
            optim.stochastic_rounding and width < 4,
            span,
        )

    def of(self, shape: tuple[int, ...], *, int8: bool = False) -> int:
        """Of a whole parameter."""
        if int8:
            return _low_bit(shape, 0, prod(shape), replace(self, int8=True))
        return self.of_place(whole("", shape))

    def of_place(self, place: Place) -> int:
        """Of a part of a parameter."""
        if place.count == 0 or self.kind == "in place":
            return 0
        if self.kind == "adafactor":
            return _adafactor(place.shape, 2 if self.narrow else 4)
        return _low_bit(place.shape, place.start, place.count, self)


@lru_cache(maxsize=4096)
def _low_bit(shape: tuple[int, ...], start: int, count: int, memory: StepMemory) -> int:
    """The largest moment of `LowBitAdam._update`; letters as there."""
    place = Place("", shape, start, count)
    block = BLOCKS.get(memory.state_bits, 1)
    first = next(iter(spans(place, block, memory.span)))
    values = first.stop - first.start
    quantized = is_quantized(shape, memory.state_bits)
    width = values // first.rows
    padded = first.rows * -(-(first.left + width) // block) * block
    even = first.left == 0 and width % block == 0
    four = 4 * values
    gradient = four if memory.narrow else 0
    codes = values if memory.state_bits == 4 else 0
    spread = 0 if even else 4 * padded  # of scales over their blocks

    # _moments: the gradient, the first moment, and the second while it is read, or what is added to it.
    read = max(2 * four, four + spread + four) + codes if quantized else four
    moments = gradient + four + max(read, 2 * four)
    # _write: both moments, and what `largest` and `encode` take.
    largest = four + (0 if even else 4 * padded)
    encode = spread + four if spread else 0
    encode = max(encode, 4 * four - 2 * values)  # 14 bytes a value: scaled, upper, codes, borders, above
    write = 2 * four + max(largest, encode) if quantized else 0
    # The change, in the first moment's place; the values, decayed in a copy; their difference.
    held = four if (memory.narrow and not memory.masters) or memory.int8 else 0
    if memory.decays:
        change = 2 * four + held + four
        held = four
    else:
        change = 0
    change = max(change, 2 * four + held + four)
    if memory.rounds:
        change = 2 * four + held + four + 16 * values  # stochastic_round: 64-bit words, twice
    if memory.int8:  # stochastic_integers: what is below, and 64-bit words, twice
        change = 2 * four + held + four + four + 16 * values
    return max(moments, write, change)


def _adafactor(shape: tuple[int, ...], width: int) -> int:
    """torch.optim.Adafactor, one parameter at a time: the update; of a vector also its square."""
    return (1 if len(shape) > 1 else 2) * width * prod(shape)
