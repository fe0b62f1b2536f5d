"""Supports: the fixed positions of the sparse part S, computed from a key, never saved or sent.

A support is a module so that its buffers follow the layer to its device. They are computed, and in no state dict: that
holds the key and a fingerprint of the positions (:meth:`Support.get_extra_state`).

Products with S are taken in an *arranged* form, by default features × tokens, where what belongs to one feature
is contiguous: gathering features is then copying rows, and a row of S adds up rows. Each support has its own
arrangement; layers that share their input arrange it once.
"""

from __future__ import annotations

import hashlib
import struct
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.numerics.device import device_type
from sltrain_dist.numerics.keyed import draw_seed
from sltrain_dist.numerics.splitmix import key64
from sltrain_dist.sparse_lowrank.sizes import nonzeros, position_bytes, values_shape

_STATE = struct.Struct(">QQ8s")
"""What a state dict holds of a support: its two keys and the fingerprint of its positions."""

Weights = tuple[Tensor, ...]
"""What a product needs of the positions and values: made once in a call, for all slices of its tokens."""


class Products(Protocol):
    """Products with S on the device of one call: a support's own, or those of kernels.

    Tokens of scattered positions go through in slices, so that what is arranged is small, and stays in the cache.
    *Arranged* inputs and outputs, and sums of them, are tensors whose layout only the products know.

    Attributes:
        keeps_arranged: Whether arranged inputs of all tokens are saved for the backward pass instead of x, so that they
            are not arranged again.
    """

    keeps_arranged: bool

    def step(self, x: Tensor) -> int:
        """Tokens in a slice of inputs x."""

    def weights(self, V: Tensor) -> Weights:
        """For :meth:`multiply`."""

    def transposed_weights(self, V: Tensor) -> Weights:
        """For :meth:`multiply_transposed`."""

    def places(self) -> Weights:
        """For :meth:`sample`."""

    def arrange_inputs(self, x: Tensor) -> Tensor:
        """What the products need of inputs x (T, n)."""

    def arrange_outputs(self, g: Tensor) -> Tensor:
        """What the products need of outputs g (T, m)."""

    def restore_inputs(self, arranged: Tensor, out: Tensor | None = None) -> Tensor:
        """The transpose of :meth:`arrange_inputs`: (T, n), adding up what belongs to one input; in `out` or new."""

    def sum_over_tokens(self, q: Tensor, inputs: Tensor) -> Tensor:
        """qᵀx, (r, n), for q (T, r) and arranged inputs; only where :attr:`keeps_arranged`."""

    def multiply(self, weights: Weights, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """xSᵀ, (T, m), for arranged inputs; in `out` or new."""

    def multiply_transposed(self, weights: Weights, outputs: Tensor, total: Tensor | None = None) -> Tensor:
        """gS for arranged outputs, added to `total`, which may be overwritten; for :meth:`restore_inputs`."""

    def sample(self, places: Weights, outputs: Tensor, inputs: Tensor, total: Tensor | None = None) -> Tensor:
        """gᵀx at the positions, added to `total`, which may be overwritten; for :meth:`sampled`."""

    def sampled(self, total: Tensor) -> Tensor:
        """The sum over all slices in the shape of V: the gradient of V."""


SLICE = 512
"""Most tokens at a time in products with scattered positions, in two bytes a number; fewer in more, to fit a cache."""


class Support(nn.Module):
    """The positions of S in an (m, n) weight: what all supports have in common.

    Args:
        m: Rows of W (out_features).
        n: Columns of W (in_features).
        density: δ.
        seed: Makes the positions a function of (seed, name), for exact reproduction. None: a key is drawn from torch's
            default generator.
        name: The layer's construction name, such as model.layers.0.self_attn.q_proj.

    Attributes:
        nnz: Number of positions.
        values_shape: Shape of V: (nnz,) for random, else (m, k), V[i] belonging to output i.
        keys: What the positions are computed from: a key, and for `blocks` the first window. None on the meta device
            where the seed is None, until :meth:`reset` or a state dict.
        filled: False where `to_empty` gave memory to a support whose keys are None: using it is an error.

    Raises:
        ValueError: The density is outside (0, 1], or leaves no position.
    """

    kind: SupportKind
    keeps_arranged = False

    def __init__(self, m: int, n: int, density: float, *, seed: int | None = None, name: str = "") -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ValueError(f"density = {density} is outside (0, 1]")
        self.m, self.n, self.seed, self.name = m, n, seed, name
        self.nnz = nonzeros(m, n, density, self.kind)
        self.values_shape = values_shape(m, n, density, self.kind)
        if self.nnz == 0:
            raise ValueError(f"density = {density} leaves no position in a {m}×{n} layer; raise it, or drop S")
        self.keys = None if seed is None else self._make_keys(seed)
        self.filled = True
        self._fingerprint: str | None = None

    def _make_buffers(self, device: torch.device | str | None, sizes: dict[str, tuple[int, torch.dtype]]) -> None:
        """Registers the buffers, by name, and computes them unless the device is "meta"; ends every constructor."""
        device = torch.device(device or torch.get_default_device())
        for name, (size, dtype) in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device), persistent=False)
        if device.type != "meta":
            self.reset()

    def reset(self) -> None:
        """Draws a new key where the seed is None, and computes the positions, on the device where the buffers are."""
        if self.seed is None:
            self.keys = self._make_keys(draw_seed())
        self._fill()

    def _make_keys(self, seed: int) -> tuple[int, int]:
        """The keys of (seed, the layer's name)."""
        return key64(seed, self.name), 0

    def _fill(self) -> None:
        assert self.keys is not None
        self._compute(*self.keys)
        self.filled, self._fingerprint = True, None

    @abstractmethod
    def _compute(self, key: int, shift: int) -> None:
        """Writes what follows from the keys into the buffers, in place."""

    @abstractmethod
    def row_positions(self, first: int, last: int) -> Tensor:
        """Flat positions (i − first)·n + c in rows first … last − 1, as V.flatten() has them; int32 or int64."""

    @abstractmethod
    def row_values(self, first: int, last: int) -> slice:
        """Where V.flatten() has the values of rows first … last − 1."""

    def check_filled(self) -> None:
        """Raises a RuntimeError where there are no positions yet; see :attr:`filled`."""
        if not self.filled:
            raise RuntimeError("no positions yet: after to_empty(), call reset_parameters() or load a state dict")

    def indices(self) -> Tensor:
        """Flat positions i·n + c in the order of V.flatten(), int64, on the layer's device."""
        self.check_filled()
        return self.row_positions(0, self.m).long()

    def fingerprint(self) -> str:
        """16 hex digits over the shape and the positions that are in use on this device."""
        self.check_filled()
        dtype = torch.int32 if position_bytes(self.m, self.n) == 4 else torch.int64
        digest = hashlib.sha256(f"{self.kind}:{self.m}:{self.n}:".encode())
        digest.update(self.row_positions(0, self.m).detach().cpu().to(dtype).numpy().tobytes())
        return digest.hexdigest()[:16]

    def shares_inputs(self, other: Support) -> bool:
        """Whether :meth:`arrange_inputs` gives the same for both."""
        return self.n == other.n and other.kind != "blocks"

    def products(self, x: Tensor) -> Products:
        """What multiplies with S for an input x (T, n)."""
        return self

    def add_to_rows_(self, W: Tensor, V: Tensor, first: int, last: int) -> None:
        """Adds S's rows first … last − 1 to those of a weight, W (last − first, n), in place."""
        # With int32 positions as they are: neither W nor the positions get a second copy.
        values = V.reshape(-1)[self.row_values(first, last)].to(W.dtype)
        W.view(-1).index_add_(0, self.row_positions(first, last), values)

    def take_from_rows(self, G: Tensor, first: int, last: int) -> Tensor:
        """Entries at the positions, for rows first … last − 1 of a matrix, G (last − first, n); flat."""
        return G.view(-1).index_select(0, self.row_positions(first, last))

    # Products, as :class:`Products` says, for scattered positions.

    def step(self, x: Tensor) -> int:
        return 2 * SLICE // max(2, x.dtype.itemsize)

    def weights(self, V: Tensor) -> Weights:
        rows, columns = self._rows_and_columns()
        return columns, _first_of_each(rows, self.m), V.reshape(-1)

    def transposed_weights(self, V: Tensor) -> Weights:
        rows, columns = self._rows_and_columns()
        columns, order = columns.sort(stable=True)
        return rows.index_select(0, order), _first_of_each(columns, self.n), V.reshape(-1).index_select(0, order)

    def places(self) -> Weights:
        rows, columns = self._rows_and_columns()
        return rows, columns, _first_of_each(rows, self.m)

    def arrange_inputs(self, x: Tensor) -> Tensor:
        return x.t().contiguous()

    def arrange_outputs(self, g: Tensor) -> Tensor:
        return g.t().contiguous()

    def restore_inputs(self, arranged: Tensor, out: Tensor | None = None) -> Tensor:
        return untransposed(arranged, out)

    def sum_over_tokens(self, q: Tensor, inputs: Tensor) -> Tensor:
        return torch.mm(inputs, q).t()

    def multiply(self, weights: Weights, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        return untransposed(_sum_rows(inputs, *weights), out)

    def multiply_transposed(self, weights: Weights, outputs: Tensor, total: Tensor | None = None) -> Tensor:
        part = _sum_rows(outputs, *weights)
        return part if total is None else total.add_(part)

    def sample(self, places: Weights, outputs: Tensor, inputs: Tensor, total: Tensor | None = None) -> Tensor:
        rows, columns, offsets = places
        if device_type(outputs) == "cuda" and outputs.dtype.itemsize == 2:
            # CUDA's operator knows neither bf16 nor fp16; the slice of tokens is small.
            outputs, inputs = outputs.float(), inputs.float()
        # The gradient of embedding_bag by its weights: a dot product per position, summed in float32.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(outputs, inputs, columns, offsets, rows, 0)
        return summed(total, dots)

    def sampled(self, total: Tensor) -> Tensor:
        return total.view(self.values_shape)

    def extra_repr(self) -> str:
        return f"{self.kind}, nnz={self.nnz}"

    def get_extra_state(self) -> Tensor:
        """The keys and a fingerprint of the positions, (24,) uint8; zeros where there are no positions yet."""
        # Bytes, because state dicts are cast as a whole, and even bfloat16 holds 0 … 255 exactly. Of one size and on
        # the parameters' device, because torch.distributed.checkpoint loads in place.
        device = next(self.buffers()).device
        if self.keys is None or not self._has_values():
            return torch.zeros(_STATE.size, dtype=torch.uint8, device=device)
        state = _STATE.pack(*self.keys, self._fingerprint_bytes())
        return torch.frombuffer(bytearray(state), dtype=torch.uint8).to(device)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the keys of a state dict over where the seed is None, and compares the positions.

        Raises:
            ValueError: It is of other positions, or was saved before there were any. The support stays as it was.
        """
        if state.is_meta or isinstance(state, FakeTensor):
            return  # it says nothing, like the parameters beside it
        if state.shape != (_STATE.size,):
            raise ValueError(f"its key has the shape {tuple(state.shape)}, not ({_STATE.size},)")
        key, shift, saved = _STATE.unpack(bytes(state.to("cpu", torch.uint8).tolist()))
        if saved == bytes(len(saved)):
            raise ValueError("it was saved before the layer had positions; call reset_parameters() before saving")
        before = self.keys, self.filled
        if self.seed is None and self.keys != (key, shift):
            self.keys = key, shift
            self._fill()
        if not self._has_values() or self._fingerprint_bytes() == saved:
            return
        or_free = ", or with seed=None, which takes the saved positions over"
        if self.seed is None:
            self.keys, self.filled = before
            if self.keys is not None:
                self._fill()
            or_free = ""
        raise ValueError(
            f"its positions (fingerprint {saved.hex()}) are not those of this layer ({self.m}×{self.n}, {self.kind}, "
            f"{self.nnz} positions, seed={self.seed}, name={self.name!r}); make the layer as the saved one was made "
            f"(shape, density, support, name and seed){or_free}"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        error_msgs = args[-1]
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:  # reported with all others, as torch reports sizes that do not fit
            error_msgs.append(f"{prefix.rstrip('.') or 'support'}: the state dict does not fit: {error}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers where `fn` moves tensors (`to`, `cuda`, `to_empty` …), and keeps what they hold."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        was_meta, is_meta = (any(b is not None and b.is_meta for b in bs.values()) for bs in (before, self._buffers))
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new is old:
                continue
            # Not what `fn` made: to_empty's memory holds nothing, and type() casts positions, too.
            new = torch.empty_like(old, device=new.device) if was_meta or is_meta else old.to(new.device)
            self._buffers[name] = new
        if was_meta and not is_meta:
            self.filled = self.keys is not None
            if self.filled:
                self._fill()
        return self

    def _fingerprint_bytes(self) -> bytes:
        """The fingerprint, computed once: a state dict must not cost a pass over all positions."""
        self._fingerprint = self._fingerprint or self.fingerprint()
        return bytes.fromhex(self._fingerprint)

    def _has_values(self) -> bool:
        """Whether the buffers hold numbers: not on the meta device, nor as fake tensors."""
        return not any(buffer.is_meta or isinstance(buffer, FakeTensor) for buffer in self.buffers())

    def _rows_and_columns(self) -> tuple[Tensor, Tensor]:
        positions = self.row_positions(0, self.m)
        if position_bytes(self.m, self.n) == 4:
            positions = positions.int()  # what is sorted and looked up is then half as long
        rows = positions.div(self.n, rounding_mode="floor")
        return rows, positions - rows * self.n


def flatten_columns(columns: Tensor, n: int) -> Tensor:
    """Flat positions of the columns (rows, k), int64."""
    rows = torch.arange(columns.shape[0], device=columns.device, dtype=torch.int64)
    return (columns + (rows * n)[:, None]).view(-1)


def _sum_rows(rows: Tensor, which: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the rows `which`, one sum for each stretch that begins at an offset."""
    # embedding_bag: torch's only sparse product on the CPU that knows bf16, and its fastest in float32.
    return F.embedding_bag(which, rows, offsets, mode="sum", per_sample_weights=weights)


def summed(total: Tensor | None, part: Tensor) -> Tensor:
    """Adds up a gradient of V over slices of tokens, in float32 where their type is narrower."""
    if total is None:
        return part.float() if part.dtype.itemsize == 2 else part
    return total.add_(part)


def untransposed(features: Tensor, out: Tensor | None = None) -> Tensor:
    """Features × tokens as (T, features), in `out` or new: always a copy, so that it may be returned."""
    if out is None:
        out = features.new_empty(features.shape[1], features.shape[0])
    return out.copy_(features.t())


def _first_of_each(ordered: Tensor, count: int) -> Tensor:
    """Where 0 … count − 1 begin in a sorted tensor, in its type."""
    values = torch.arange(count, device=ordered.device, dtype=ordered.dtype)
    return torch.searchsorted(ordered, values, out_int32=ordered.dtype == torch.int32)
