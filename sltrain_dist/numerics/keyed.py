"""Initial values keyed by (seed, name): the same on every machine, rank and device.

They are counter-based: value i of a flattened tensor is a function of the key and i, so that each rank computes its own
range. All arithmetic is addition, multiplication, division and square root, which IEEE 754 rounds identically
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from sltrain_dist.numerics.int8_layout import INT8_GROUP
from sltrain_dist.numerics.int8_weight import Int8Weight, parts_of
from sltrain_dist.numerics.splitmix import key64, splitmix64

CHUNK = 1 << 18
"""Largest number of values drawn, or read from a checkpoint, at a time: 1 MiB in float32."""
_IN_CACHE = 1 << 14
"""Number of values transformed at a time, so that all passes over them stay in the processor's cache; even."""

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Floats = TypeVar("Floats", Float32, Float64)


def draw_seed() -> int:
    """Draws a seed from torch's default generator, which `torch.manual_seed` sets."""
    with _disable_current_modes():  # the value of a fake tensor cannot be read
        return int(torch.randint(2**63 - 1, (), device="cpu"))


def chunks(count: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of consecutive chunks of `count` values: whole units, about :data:`CHUNK` values each."""
    step = max(1, CHUNK // unit) * unit
    for start in range(0, count, step):
        yield start, min(start + step, count)


@dataclass(frozen=True)
class Initial:
    """How a tensor is initialised. Any range of its values can be computed by itself.

    Attributes:
        kind: constant, uniform: U(−scale, scale), or normal: N(0, scale²).
        scale: The constant, the bound, or the standard deviation.
        key: Key of the stream that the values are drawn from; unused for a constant.
    """

    kind: Literal["constant", "uniform", "normal"]
    scale: float
    key: int = 0

    @classmethod
    def constant(cls, value: float) -> Initial:
        """Returns the initialisation that sets every value to `value`."""
        return cls("constant", value)

    @classmethod
    def uniform(cls, bound: float, seed: int, name: str) -> Initial:
        """Returns the initialisation U(−bound, bound), keyed by (seed, name)."""
        return cls("uniform", bound, key64(seed, name))

    @classmethod
    def normal(cls, std: float, seed: int, name: str) -> Initial:
        """Returns the initialisation N(0, std²), keyed by (seed, name)."""
        return cls("normal", std, key64(seed, name))

    def read(self, start: int, count: int) -> Tensor:
        """Returns values start … start + count − 1 of the flattened tensor, float32 on the CPU."""
        values = np.full(count, self.scale if self.kind == "constant" else 0.0, dtype=np.float32)
        if self.kind != "constant":
            transform = _uniform if self.kind == "uniform" else _normal
            for first in range(0, count, _IN_CACHE):
                part = values[first : first + _IN_CACHE]
                np.multiply(transform(_integers(self.key, start + first, len(part))), np.float32(self.scale), out=part)
        return torch.from_numpy(values)

    @torch.no_grad()
    def fill_(self, tensor: Tensor) -> None:
        """Fills a tensor in place, chunk by chunk. Meta and fake tensors, which have no values, are left alone."""
        if any(part.is_meta or isinstance(part, FakeTensor) for part in parts_of(tensor).values()):
            return
        if isinstance(tensor, Int8Weight):
            tensor.scales.zero_()  # every row gets a new scale
            for start, stop in chunks(tensor.numel(), tensor.shape[-1] if tensor.dim() > 1 else INT8_GROUP):
                tensor.write(start, self.read(start, stop - start).to(tensor.device))
            return
        flat = tensor.detach().view(-1)
        for start, stop in chunks(flat.numel()):
            flat[start:stop].copy_(self.read(start, stop - start))


def _integers(key: int, start: int, count: int) -> npt.NDArray[np.int32]:
    """Returns uniform 32-bit integers from number `start` on: lower and upper halves of SplitMix64's words."""
    first, last = start // 2, (start + count + 1) // 2
    halves = splitmix64(key, first, last - first).astype("<u8", copy=False).view("<i4")
    return halves[start - 2 * first :][:count]


def _uniform(integers: npt.NDArray[np.int32]) -> Float32:
    """Maps uniform 32-bit integers to U(−1, 1)."""
    return integers.astype(np.float32) * np.float32(2.0**-31)


def _normal(integers: npt.NDArray[np.int32]) -> Float32:
    """Maps uniform 32-bit integers to N(0, 1) by the inverse distribution function, which algorithm AS 241 approximates
    to seven digits (PPND7, Wichura, Applied Statistics 37, 1988)."""
    q = integers.astype(np.float32)
    q *= np.float32(2.0**-32)  # the probability minus ½
    r = np.float32(0.180625) - q * q
    values = q * _polynomial(r, 59.109374720, 159.29113202, 50.434271938, 3.3871327179)
    values /= _polynomial(r, 67.187563600, 78.757757664, 17.895169469, 1.0)
    (tails,) = np.nonzero(np.abs(q) > np.float32(0.425))
    # Shifted by half an integer, so that no probability is 0 or 1 and both tails are alike.
    shifted = integers[tails] + 0.5
    r = np.sqrt(-_log((2.0**31 - np.abs(shifted)) * 2.0**-32)) - 1.6
    ends = _polynomial(r, 0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)
    ends /= _polynomial(r, 0.12021132975, 0.73700164250, 1.0)
    values[tails] = np.copysign(ends, shifted)
    return values


def _log(x: Float64) -> Float64:
    """Returns the natural logarithm of positive x, to 1e-11; libraries' logarithms are not rounded identically."""
    fraction, exponent = np.frexp(x)  # fraction in [½, 1)
    s = (fraction - math.sqrt(0.5)) / (fraction + math.sqrt(0.5))
    series = _polynomial(s * s, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)
    return s * series + (exponent - 0.5) * 0.6931471805599453


def _polynomial(x: Floats, *coefficients: float) -> Floats:
    """Evaluates a polynomial in the type of x; the coefficient of the highest power comes first."""
    first, second, *others = map(x.dtype.type, coefficients)
    value = x * first
    value += second
    for coefficient in others:
        value *= x
        value += coefficient
    return value
