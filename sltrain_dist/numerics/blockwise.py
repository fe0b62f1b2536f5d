"""Block quantization: every block of values shares one float32 scale, its largest magnitude, and each value is
the nearest of 256 or 16 levels times that.

The levels of 8 bits are the dynamic tree map of Dettmers et al., "8-bit Optimizers via Block-wise Quantization"
(arXiv 2110.02861), as bitsandbytes and torchao build it, but for the unsigned map's zero (see
:func:`unsigned_levels`); those of 4 bits are others. Blocks of 256 and 128 are torchao's and Li et al.'s (arXiv
2309.01507).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def _decade(items: int, exponent: int) -> list[float]:
    """Centres of `items` equal parts of [0.1, 1], times 10^exponent."""
    return [(0.1 + 0.9 * (i + 0.5) / items) * 10.0**exponent for i in range(items)]


def signed_levels(bits: int) -> list[float]:
    """Levels of what has both signs, zero and ±1 or nearly so among them.

    8 bits: the signed dynamic map, in every decade twice as many values of both signs as in the one below.
    4 bits: NF4, quantiles of the normal distribution (Dettmers et al., arXiv 2305.14314), because the first moments of
    a block are nearly normal. The dynamic map of 4 bits has few levels where most of them are (docs/memory.md).
    """
    if bits == 4:
        return _normal_levels()
    decades = bits - 1
    magnitudes = [level for i in range(decades) for level in _decade(1 << i, i + 1 - decades)]
    return sorted([*magnitudes, *(-level for level in magnitudes), 0.0, 1.0])


def _normal_levels() -> list[float]:
    """NF4: zero, and on each side quantiles evenly spaced in probability, as shares of the largest."""
    edge = (1 - 1 / 30 + 1 - 1 / 32) / 2

    def quantiles(count: int) -> list[float]:
        found = [NormalDist().inv_cdf(edge + (0.5 - edge) * i / count) for i in range(count)]
        return [value / found[0] for value in found]

    return sorted([*quantiles(8), 0.0, *(-value for value in quantiles(7))])


def unsigned_levels(bits: int) -> list[float]:
    """Levels of what is never negative, and none of them zero.

    A second moment that is rounded to zero, beside a first one that is not, would make a step of first / eps.
    8 bits: the unsigned dynamic map, with 5.5e-8, the next decade's centre, in the place of its zero.
    4 bits: squares of sixteen equal parts of [0, 1] without their lower end: even in the root, which is what the
    update divides by. (Li et al. take the parts themselves, whose updates are off by almost twice as much.)
    """
    if bits == 4:
        return [((i + 1) / 16) ** 2 for i in range(16)]
    decades = bits - 1
    levels = [level for i in range(decades) for level in _decade(2 << i, i + 1 - decades)]
    return sorted([*levels, *_decade(1, -decades), 1.0])


@dataclass(frozen=True)
class Quantizer:
    """Levels of one kind of state, on one device.

    Attributes:
        block: Values that share a scale.
        levels: (2^bits,) float32, rising, within [-1, 1].
        borders: (2^bits,) float32, half way between neighbouring levels, and infinity.
        table: (65536,) uint8, the level of the least value with each upper half of a float32's bits, by these 16
            bits as a signed number plus 32768. Such values lie within 1/128 of each other, closer than any two
            borders, so that one comparison tells the rest. (Four times as fast on the CPU as torch.bucketize.)
    """

    block: int
    levels: Tensor
    borders: Tensor
    table: Tensor

    def largest(self, values: Tensor, left: int = 0) -> Tensor:
        """Largest magnitude of every block; NaN where a value is.

        Args:
            values: (rows, width) float32.
            left: Values of the first block that lie before column 0 and are not here.

        Returns:
            (rows, blocks) float32; blocks begin anew in every row, and the last one may be short.
        """
        rows, width = values.shape
        magnitudes = values.abs()
        right = -(left + width) % self.block
        if left or right:
            magnitudes = pad(magnitudes, (left, right))
        return magnitudes.view(rows, -1, self.block).amax(-1)

    def encode(self, values: Tensor, scales: Tensor, left: int = 0) -> Tensor:
        """The nearest level of every value, as (rows, width) uint8; arguments as of :meth:`largest`.

        Needs 14 bytes a value besides its result. Where a scale is not finite, neither is what is decoded.
        """
        scaled = self._by_block(values, torch.where(scales == 0, 1.0, scales), left, torch.div)
        if not scaled.is_contiguous():
            raise AssertionError("its bits are looked at")
        upper = (scaled.view(torch.int32) >> 16).add_(1 << 15).view(-1)
        codes = self.table.index_select(0, upper)
        torch.add(codes, 0, out=upper)  # as indices
        above = scaled.view(-1) > self.borders.index_select(0, upper)
        return codes.add_(above).view(values.shape)

    def decode(self, codes: Tensor, scales: Tensor, left: int = 0) -> Tensor:
        """(rows, width) float32: levels times their block's scale. Needs 8 bytes a value, its result included."""
        values = self.levels.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return self._by_block(values, scales, left, torch.mul)

    def _by_block(
        self, values: Tensor, scales: Tensor, left: int, operation: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        rows, width = values.shape
        if left == 0 and width % self.block == 0:
            return operation(values.view(rows, -1, self.block), scales[..., None]).view(rows, width)
        return operation(values, scales.repeat_interleave(self.block, -1)[:, left : left + width])


_made: dict[tuple[int, int, torch.device, bool], Quantizer] = {}


def quantizer(bits: int, block: int, device: torch.device, *, signed: bool) -> Quantizer:
    """The quantizer of 8 or 4 bits; the same one again where it has been made.

    Raises:
        ValueError: Other bits.
    """
    if bits not in (8, 4):
        raise ValueError(f"there are quantizers of 8 and 4 bits, not of {bits}")
    key = (bits, block, device, signed)
    # Fake tensors do not mix with others, and must not outlive their mode.
    fake_mode = getattr(torch.empty(0), "fake_mode", None)
    made: dict[Any, Quantizer] = _made if fake_mode is None else vars(fake_mode).setdefault("quantizers", {})
    if key in made:
        return made[key]
    exact = torch.tensor(signed_levels(bits) if signed else unsigned_levels(bits), dtype=torch.float64)
    borders = ((exact[1:] + exact[:-1]) / 2).float()
    made[key] = Quantizer(
        block,
        exact.float().to(device),
        torch.cat((borders, torch.tensor([torch.inf]))).to(device),
        torch.bucketize(_least_by_upper_half(), borders).to(device, torch.uint8),
    )
    return made[key]


def _least_by_upper_half() -> Tensor:
    """(65536,) float32, the least value with each upper half of the bits; NaN among them."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    return torch.where(halves < 0, halves | 0xFFFF, halves).view(torch.float32)


def pack(codes: Tensor, *, odd: bool = False) -> Tensor:
    """Two 4-bit codes a byte, the first in its low half.

    Args:
        codes: (rows, width) uint8, under 16.
        odd: Whether a row begins with the high half of a byte, whose low half stays zero.

    Returns:
        (rows, ceil((width + odd) / 2)) uint8.
    """
    right = (codes.shape[1] + odd) % 2
    if odd or right:
        codes = pad(codes, (int(odd), right))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, width: int, *, odd: bool = False) -> Tensor:
    """(rows, width) uint8 codes of what :func:`pack` made."""
    both = torch.stack((packed & 15, packed >> 4), -1).view(packed.shape[0], -1)
    return both[:, int(odd) : int(odd) + width]
