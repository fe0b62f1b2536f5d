"""Block-wise quantization: the values of a group share one float32 scale, their largest magnitude, and each value is
stored as the nearest of 256 or 16 levels times that scale.

The 8-bit levels are the dynamic tree map of Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv
2110.02861), as in bitsandbytes and torchao, except for the zero of the unsigned map (see :func:`unsigned_levels`). The
4-bit levels are different maps. Groups of 256 and 128 values are torchao's and Li et al.'s (arXiv 2309.01507).
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
    """Returns the centres of `items` equal parts of [0.1, 1], times 10^exponent."""
    return [(0.1 + 0.9 * (i + 0.5) / items) * 10.0**exponent for i in range(items)]


def signed_levels(bits: int) -> list[float]:
    """Returns the levels for states of both signs; zero and ±1 (or nearly so) are among them.

    8 bits: the signed dynamic map, in which every decade has twice as many values of each sign as the one below.
    4 bits: NF4, quantiles of the normal distribution (Dettmers et al., arXiv 2305.14314), because the first moments of
    a group are nearly normal. The 4-bit dynamic map has few levels where most of them are (docs/memory.md).
    """
    if bits == 4:
        return _normal_levels()
    decades = bits - 1
    magnitudes = [level for i in range(decades) for level in _decade(1 << i, i + 1 - decades)]
    return sorted([*magnitudes, *(-level for level in magnitudes), 0.0, 1.0])


def _normal_levels() -> list[float]:
    """Returns NF4: zero, and on each side quantiles evenly spaced in probability, divided by the largest."""
    edge = (1 - 1 / 30 + 1 - 1 / 32) / 2

    def quantiles(count: int) -> list[float]:
        values = [NormalDist().inv_cdf(edge + (0.5 - edge) * i / count) for i in range(count)]
        return [value / values[0] for value in values]

    return sorted([*quantiles(8), 0.0, *(-value for value in quantiles(7))])


def unsigned_levels(bits: int) -> list[float]:
    """Returns the levels for states that are never negative; zero is not among them.

    A second moment rounded to zero, with a first moment that is not, would make an update of first / eps.
    8 bits: the unsigned dynamic map, with 5.5e-8, the centre of the next lower decade, in place of its zero.
    4 bits: the squares of 1/16, 2/16, … 1, evenly spaced in the square root, which the update divides by. (Li et al.
    space the second moments themselves evenly; their updates are off by almost twice as much.)
    """
    if bits == 4:
        return [((i + 1) / 16) ** 2 for i in range(16)]
    decades = bits - 1
    levels = [level for i in range(decades) for level in _decade(2 << i, i + 1 - decades)]
    return sorted([*levels, *_decade(1, -decades), 1.0])


@dataclass(frozen=True)
class Quantizer:
    """The levels of one kind of state, as tables on one device.

    Attributes:
        group_size: Number of values that share a scale.
        levels: (2^bits,) float32, ascending, within [-1, 1].
        borders: (2^bits,) float32, the midpoints between neighbouring levels, then infinity.
        table: (65536,) uint8, indexed by the upper 16 bits of a float32, as a signed number plus 32768: the level of
            the least value with these upper bits. All such values lie within 1/128 of each other, closer than any two
            borders, so that one comparison finds the nearest level. (Four times as fast on the CPU as torch.bucketize.)
    """

    group_size: int
    levels: Tensor
    borders: Tensor
    table: Tensor

    def largest(self, values: Tensor, left: int = 0) -> Tensor:
        """Returns the largest magnitude of every group; NaN if the group contains one.

        Args:
            values: (rows, width) float32.
            left: Number of values of the first group that lie before column 0 and are not passed.

        Returns:
            (rows, groups) float32. Every row begins a new group, and its last group may be shorter.
        """
        rows, width = values.shape
        magnitudes = values.abs()
        right = -(left + width) % self.group_size
        if left or right:
            magnitudes = pad(magnitudes, (left, right))
        return magnitudes.view(rows, -1, self.group_size).amax(-1)

    def encode(self, values: Tensor, scales: Tensor, left: int = 0) -> Tensor:
        """Returns the number of the level nearest to each value, (rows, width) uint8; arguments as of :meth:`largest`.

        Needs 14 bytes per value besides the result. If a scale is not finite, its values are not finite when decoded.
        """
        scaled = self._by_group(values, torch.where(scales == 0, 1.0, scales), left, torch.div)
        if not scaled.is_contiguous():
            raise AssertionError("the values to encode must be contiguous: their bits are reinterpreted")
        upper = (scaled.view(torch.int32) >> 16).add_(1 << 15).view(-1)
        codes = self.table.index_select(0, upper)
        torch.add(codes, 0, out=upper)  # converted to int32 indices
        above = scaled.view(-1) > self.borders.index_select(0, upper)
        return codes.add_(above).view(values.shape)

    def decode(self, codes: Tensor, scales: Tensor, left: int = 0) -> Tensor:
        """Returns levels times their group's scale, (rows, width) float32. Needs 8 bytes per value, result included."""
        values = self.levels.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return self._by_group(values, scales, left, torch.mul)

    def _by_group(
        self, values: Tensor, scales: Tensor, left: int, operation: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        rows, width = values.shape
        if left == 0 and width % self.group_size == 0:
            return operation(values.view(rows, -1, self.group_size), scales[..., None]).view(rows, width)
        return operation(values, scales.repeat_interleave(self.group_size, -1)[:, left : left + width])


_cache: dict[tuple[int, int, torch.device, bool], Quantizer] = {}


def quantizer(bits: int, group_size: int, device: torch.device, *, signed: bool) -> Quantizer:
    """Returns the quantizer of 8 or 4 bits; each is made once and cached.

    Raises:
        ValueError: `bits` is neither 8 nor 4.
    """
    if bits not in (8, 4):
        raise ValueError(f"quantized states have 8 or 4 bits, not {bits}")
    key = (bits, group_size, device, signed)
    # Fake tensors cannot be mixed with real ones, and must not outlive their mode.
    fake_mode = getattr(torch.empty(0), "fake_mode", None)
    cache: dict[Any, Quantizer] = _cache if fake_mode is None else vars(fake_mode).setdefault("quantizers", {})
    if key in cache:
        return cache[key]
    exact = torch.tensor(signed_levels(bits) if signed else unsigned_levels(bits), dtype=torch.float64)
    borders = ((exact[1:] + exact[:-1]) / 2).float()
    cache[key] = Quantizer(
        group_size,
        exact.float().to(device),
        torch.cat((borders, torch.tensor([torch.inf]))).to(device),
        torch.bucketize(_least_by_upper_half(), borders).to(device, torch.uint8),
    )
    return cache[key]


def _least_by_upper_half() -> Tensor:
    """Returns the least float32 with each pattern of the upper 16 bits, (65536,); some are NaN."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    return torch.where(halves < 0, halves | 0xFFFF, halves).view(torch.float32)


def pack(codes: Tensor, *, odd: bool = False) -> Tensor:
    """Packs two 4-bit codes into each byte, the first into its low half.

    Args:
        codes: (rows, width) uint8, under 16.
        odd: Whether each row begins in the high half of a byte; the low half then stays zero.

    Returns:
        (rows, ceil((width + odd) / 2)) uint8.
    """
    right = (codes.shape[1] + odd) % 2
    if odd or right:
        codes = pad(codes, (int(odd), right))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, width: int, *, odd: bool = False) -> Tensor:
    """Returns the codes that :func:`pack` packed, (rows, width) uint8."""
    both = torch.stack((packed & 15, packed >> 4), -1).view(packed.shape[0], -1)
    return both[:, int(odd) : int(odd) + width]
