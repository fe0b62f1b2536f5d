"""int8 weights: parameters stored as int8 codes and float32 scales, one scale per row.

To autograd and the engines, an :class:`Int8Weight` is an ordinary floating-point leaf: it reports a floating-point type
and the shape of its values, and has a dense gradient. It refuses arithmetic. Code that computes with it takes its
values by :func:`plain`, inside an autograd function, so that the codes are what is saved for the backward pass.

New values are rounded up or down at random, so that the mean is exact (as in the int8 training of torchao and Q-GaLore,
arXiv 2407.08296). A row keeps its scale as long as its values fit: values that do not change are not rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain_dist.numerics.device import in_turn
from sltrain_dist.numerics.int8_layout import INT8_GROUP, scale_count
from sltrain_dist.numerics.rounding import stochastic_integers

_LARGEST = 127
_RESCALE_BELOW = 64
"""A row gets a new scale if its largest code would be smaller than this, because half of the codes would be unused."""
_NEW_LARGEST = 112
"""The largest code of a row under a new scale. An eighth is left for growth, so that scales seldom change."""
_CHUNK = 1 << 21
"""Number of values that are quantized, or dequantized by rows, at a time."""

aten = torch.ops.aten


class Int8Weight(Tensor):
    """A weight stored as int8 codes and float32 scales.

    Attributes:
        codes: int8, of the weight's shape, within ±127.
        scales: (:func:`scale_count`,) float32. A value is its code times its row's (in a vector, its group's) scale.
    """

    codes: Tensor
    scales: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Int8Weight:
        """Takes the attributes, and the type that the weight and its gradient report."""
        # Without storage of its own, so that code that counts storages counts the codes and scales only.
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device, storage_size=0)

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scales = codes, scales

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Int8Weight:
        """Returns a weight with uninitialised values."""
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(scale_count(shape), device=device), dtype)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Returns values start … stop − 1 of the flattened weight in a new tensor; `start` begins a row or group."""
        values = self.codes.view(-1)[start:stop].to(dtype)
        for part, scales in self._by_scale(values, start):
            part.mul_(scales[:, None])  # computed in float32 and rounded once
        return values

    def write(self, start: int, values: Tensor, round_: Callable[[Tensor, int], Tensor] | None = None) -> None:
        """Stores values from position `start` on; they must be whole rows or groups.

        A value that is not finite makes its whole row not finite.

        Args:
            start: Position of the first value in the flattened weight.
            values: Flat, float32; overwritten.
            round_: Rounds (values divided by their scales, `start`) to integers. None: to the nearest.
        """
        for part, scales in self._by_scale(values, start):
            largest = torch.linalg.vector_norm(part, torch.inf, dim=1)
            fits = (largest <= _LARGEST * scales) & (largest >= _RESCALE_BELOW * scales)
            # Multiplied by the inverse: CUDA divides by a Python number this way, the CPU does not; codes would differ.
            scales.copy_(torch.where(fits, scales, largest * (1 / _NEW_LARGEST)))
            part.div_(torch.where(scales == 0, 1.0, scales)[:, None])
        codes = values.round_() if round_ is None else round_(values, start)
        codes.nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST)
        self.codes.view(-1)[start : start + values.numel()] = codes

    def write_stochastic(self, start: int, values: Tensor, key: int) -> None:
        """Like :meth:`write`, but rounds up or down at random, depending only on `key` and each value's position."""
        self.write(start, values, lambda scaled, first: stochastic_integers(scaled, key, first))

    def row_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yields a matrix some rows at a time: (the rows' slice, their values)."""
        rows, width = self.shape
        per_chunk = max(1, _CHUNK // width)
        for first in in_turn(range(0, rows, per_chunk)):
            last = min(rows, first + per_chunk)
            yield slice(first, last), self.read(first * width, last * width, dtype).view(-1, width)

    def _by_scale(self, values: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields views of flat values as (rows, width) with the rows' scales; a vector's last group may be shorter."""
        width = self.shape[-1] if self.dim() > 1 else INT8_GROUP
        first, offset = divmod(start, width)
        if offset:
            raise AssertionError(f"{start} is not the start of a row or group of {width} values")
        rows, remainder = divmod(values.numel(), width)
        yield values[: rows * width].view(-1, width), self.scales[first : first + rows]
        if remainder:
            yield values[rows * width :].view(1, -1), self.scales[first + rows : first + rows + 1]

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Names the inner tensors, so that torch moves them together (`nn.Module.to_empty`)."""
        return ["codes", "scales"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Int8Weight:
        return cls(parts["codes"], parts["scales"], dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Implements what modules, autograd and checkpointing do with parameters; refuses everything else."""
        kwargs = kwargs or {}
        weight = args[0]
        if not isinstance(weight, Int8Weight):
            raise NotImplementedError(f"{func} cannot take the int8 weight in {args!r}; use plain() to get its values")
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
        raise NotImplementedError(f"{func} cannot take an int8 weight; use plain() to get its values")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, dtype={self.dtype}, {self.device})"


def dequantized(weight: Tensor) -> Tensor:
    """Returns an int8 weight's values, whose gradient becomes the weight's; any other tensor as it is."""
    return _Dequantize.apply(weight) if isinstance(weight, Int8Weight) else weight


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in the type of products. An int8 weight stays as it is: the products below read it by rows."""
    return weight if isinstance(weight, Int8Weight) else weight.to(dtype)


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x Wᵀ for x (T, n) and a weight (m, n) from :func:`cast_weight`; an int8 weight some rows at a time."""
    if not isinstance(weight, Int8Weight):
        return x @ weight.T
    y = x.new_empty(len(x), weight.shape[0])
    for rows, values in weight.row_chunks(x.dtype):
        y[:, rows] = x @ values.T
    return y


def times(g: Tensor, weight: Tensor) -> Tensor:
    """Returns g W for g (T, m) and a weight as above; sums over an int8 weight's rows at least in float32."""
    if not isinstance(weight, Int8Weight):
        return g @ weight
    total = g.new_zeros(len(g), weight.shape[1], dtype=torch.promote_types(g.dtype, torch.float32))
    for rows, values in weight.row_chunks(g.dtype):
        total += g[:, rows] @ values
    return total.to(g.dtype)


def plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the values of an int8 weight, a new tensor of type `dtype` without a graph; any other tensor as it is."""
    if not isinstance(tensor, Int8Weight):
        return tensor
    return tensor.read(0, tensor.numel(), dtype).view(tensor.shape)


def parts_of(parameter: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that store a parameter, by the suffix of their names in checkpoints: codes and scales of an
    int8 weight; otherwise the parameter itself, detached, without a suffix."""
    if isinstance(parameter, Int8Weight):
        return {".codes": parameter.codes, ".scales": parameter.scales}
    return {"": parameter.detach()}


def _assign(weight: Int8Weight, source: Tensor) -> Int8Weight:
    """Copies a float tensor's values, rounded to the nearest code, or the codes and scales of another int8 weight."""
    if isinstance(source, Int8Weight):
        weight.codes.copy_(source.codes)
        weight.scales.copy_(source.scales)
        return weight
    if source.shape != weight.shape:
        raise ValueError(f"cannot copy values of shape {tuple(source.shape)} to a weight of {tuple(weight.shape)}")
    weight.scales.zero_()  # every row gets a new scale, whatever the old one was
    width = weight.shape[-1] if weight.dim() > 1 else INT8_GROUP
    step = max(1, _CHUNK // width) * width
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
