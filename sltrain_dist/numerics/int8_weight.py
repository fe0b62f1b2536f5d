"""int8 weights: parameters whose values are int8 codes times float32 scales, one scale a row.

To autograd and the engines an :class:`Int8Weight` is an ordinary leaf of a floating type: it has that type's name and
shape, and a dense gradient. Arithmetic on it is refused. What computes with it asks for its values, by
:func:`plain`, inside of an autograd function, so that what is saved for the backward pass are the codes.

A new value is rounded up or down to a code at random, right in the mean (as torchao's and Q-GaLore's int8 training do,
arXiv 2407.08296), and a row keeps its scale as long as it fits: values that do not change are not rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain_dist.numerics.int8_layout import INT8_BLOCK, scale_count
from sltrain_dist.numerics.rounding import stochastic_integers

_LARGEST = 127
_LEAST_LARGEST = 64
"""A row whose largest code would be smaller gets a new scale: half of the codes would go to waste."""
_FRESH = 112
"""The largest code under a new scale: an eighth is left to grow, so that scales seldom change."""
_SPAN = 1 << 21
"""Values that are quantized, or handed out as rows, at a time."""

aten = torch.ops.aten


class Int8Weight(Tensor):
    """A weight of int8 codes and float32 scales.

    Attributes:
        codes: int8, of the weight's shape, within ±127.
        scales: (:func:`scale_count`,) float32. A value is its code times its row's (a vector's: its block's) scale.
    """

    codes: Tensor
    scales: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Int8Weight:
        """Args: the attributes, and the type that the weight and its gradient show."""
        # Without storage of its own: whoever counts storages finds the codes and scales.
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device, storage_size=0)

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scales = codes, scales

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Int8Weight:
        """A weight of uninitialised values."""
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(scale_count(shape), device=device), dtype)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Values start … stop − 1 of the flattened weight, a new flat tensor; `start` begins a row or block."""
        values = self.codes.view(-1)[start:stop].to(dtype)
        for part, scales in self._by_scale(values, start):
            part.mul_(scales[:, None])  # in float32, and rounded once
        return values

    def write(self, start: int, values: Tensor, round_: Callable[[Tensor, int], Tensor] | None = None) -> None:
        """Stores values from `start` on, which begins a row or block, to the end of another.

        A row with a value that is not finite becomes not finite as a whole.

        Args:
            start: In the flattened weight.
            values: Flat, float32; overwritten.
            round_: Rounds (values in units of their scale, `start`) to integers; None rounds to the nearest.
        """
        for part, scales in self._by_scale(values, start):
            largest = torch.linalg.vector_norm(part, torch.inf, dim=1)
            fits = (largest <= _LARGEST * scales) & (largest >= _LEAST_LARGEST * scales)
            # Times the inverse: CUDA divides by a number of Python's so, the CPU does not, and codes would differ.
            scales.copy_(torch.where(fits, scales, largest * (1 / _FRESH)))
            part.div_(torch.where(scales == 0, 1.0, scales)[:, None])
        codes = values.round_() if round_ is None else round_(values, start)
        codes.nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST)
        self.codes.view(-1)[start : start + values.numel()] = codes

    def write_stochastic(self, start: int, values: Tensor, key: int) -> None:
        """Like :meth:`write`, rounding up or down at random: by `key` and a value's position alone."""
        self.write(start, values, lambda scaled, first: stochastic_integers(scaled, key, first))

    def row_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """A matrix some rows at a time: which they are, and their values."""
        rows, width = self.shape
        per_block = max(1, _SPAN // width)
        for first in range(0, rows, per_block):
            last = min(rows, first + per_block)
            yield slice(first, last), self.read(first * width, last * width, dtype).view(-1, width)

    def dequantize(self) -> Tensor:
        """The values, in the type that the weight shows; its gradient is the weight's."""
        return _Dequantize.apply(self)

    def _by_scale(self, values: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of flat values as (rows, width), with the rows' scales; a vector's last block may be shorter."""
        width = self.shape[-1] if self.dim() > 1 else INT8_BLOCK
        first, off = divmod(start, width)
        if off:
            raise AssertionError(f"{start} is within a row of {width}")
        rows, left = divmod(values.numel(), width)
        yield values[: rows * width].view(-1, width), self.scales[first : first + rows]
        if left:
            yield values[rows * width :].view(1, -1), self.scales[first + rows : first + rows + 1]

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """What makes torch move a parameter's parts together (`nn.Module.to_empty`)."""
        return ["codes", "scales"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Int8Weight:
        return cls(parts["codes"], parts["scales"], dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What modules, autograd and checkpointing do with parameters; everything else is refused."""
        kwargs = kwargs or {}
        weight = args[0]
        if not isinstance(weight, Int8Weight):
            raise NotImplementedError(f"{func} of {args!r}: take the values of an int8 weight first, by plain()")
        if func is aten.detach.default or (func is aten.view.default and tuple(args[1]) == tuple(weight.shape)):
            return Int8Weight(weight.codes, weight.scales, weight.dtype)
        if func is aten.empty_like.default:
            device = kwargs.get("device") or weight.device
            return Int8Weight.empty(tuple(weight.shape), kwargs.get("dtype") or weight.dtype, device)
        if func is aten._to_copy.default:
            device = kwargs.get("device") or weight.device
            codes, scales = (part.to(device, copy=True) for part in (weight.codes, weight.scales))
            return Int8Weight(codes, scales, kwargs.get("dtype") or weight.dtype)
        if func is aten.zero_.default:
            weight.codes.zero_()
            weight.scales.zero_()
            return weight
        if func is aten.copy_.default:
            return _assign(weight, args[1])
        raise NotImplementedError(f"{func} of an int8 weight: take its values first, by plain()")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, shows {self.dtype}, {self.device})"


def plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of an int8 weight, a new tensor of type `dtype`, without a graph; any other tensor as it is."""
    if not isinstance(tensor, Int8Weight):
        return tensor
    return tensor.read(0, tensor.numel(), dtype).view(tensor.shape)


def parts_of(parameter: Tensor) -> dict[str, Tensor]:
    """The tensors in memory behind a parameter, by the ending of their names in checkpoints: codes and scales of an
    int8 weight; else the parameter itself, detached, without an ending."""
    if isinstance(parameter, Int8Weight):
        return {".codes": parameter.codes, ".scales": parameter.scales}
    return {"": parameter.detach()}


def _assign(weight: Int8Weight, source: Tensor) -> Int8Weight:
    """Takes a float tensor's values, rounded to the nearest code; or another weight's, as they are."""
    if isinstance(source, Int8Weight):
        weight.codes.copy_(source.codes)
        weight.scales.copy_(source.scales)
        return weight
    if source.shape != weight.shape:
        raise ValueError(f"values of shape {tuple(source.shape)} for a weight of {tuple(weight.shape)}")
    weight.scales.zero_()  # new ones for all: the weight's old scales do not matter
    width = weight.shape[-1] if weight.dim() > 1 else INT8_BLOCK
    step = max(1, _SPAN // width) * width
    for start in range(0, weight.numel(), step):
        values = source.detach().reshape(-1)[start : start + step]
        weight.write(start, values.to(weight.device, torch.float32, copy=True))
    return weight


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Int8Weight) -> Tensor:
        return plain(weight, weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
