"""Supports: the fixed positions of the sparse part S, computed from a key and never saved or sent.

A support is a module so that its buffers follow the layer to its device. The buffers are computed, and not in the state
dict, which holds the keys and a fingerprint of the positions (:meth:`Support.get_extra_state`).

Products with S take *arranged* inputs, by default features × tokens, in which the values of one feature are contiguous:
gathering features then copies rows, and a row of S adds up rows. Each support has its own arrangement; layers that
share their input arrange it once.
"""

from __future__ import annotations

import hashlib
import struct
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.numerics.device import device_type
from sltrain_dist.numerics.keyed import draw_seed
from sltrain_dist.numerics.splitmix import key64
from sltrain_dist.sparse_lowrank.sizes import SLICE, nonzeros, position_bytes, values_shape

_STATE = struct.Struct(">QQ8s")
"""The state of a support in a state dict: its two keys and the fingerprint of its positions."""

Weights = tuple[Tensor, ...]
"""What a product needs of the positions and values, computed once per call for all slices of its tokens."""


class Support(nn.Module):
    """The positions of S in an (m, n) weight: the base class of all supports.

    Args:
        m: Rows of W (out_features).
        n: Columns of W (in_features).
        density: δ.
        seed: Makes the positions a function of (seed, name), for exact reproduction. None: a key is drawn from torch's
            default generator.
        name: The layer's construction name, such as model.layers.0.self_attn.q_proj.

    Attributes:
        nnz: Number of positions.
        values_shape: Shape of V: (nnz,) for random, else (m, k), where V[i] belongs to output i.
        keys: The numbers that the positions are computed from: a key, and for `blocks` the first window. None on the
            meta device if the seed is None, until :meth:`reset` or a state dict sets them.
        keeps_arranged: Whether the arranged inputs of all tokens are saved for the backward pass instead of x, so that
            they are not arranged again.
        filled: Whether the positions may be used. False after `to_empty` has allocated a support whose keys are None.

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
        """Registers the buffers by name and, except on "meta", computes them; every constructor ends with this."""
        device = torch.device(device or torch.get_default_device())
        for name, (size, dtype) in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device), persistent=False)
        if device.type != "meta":
            self.reset()

    def reset(self) -> None:
        """Computes the positions on the buffers' device; draws a new key first if the seed is None."""
        if self.seed is None:
            self.keys = self._make_keys(draw_seed())
        self._fill()

    def _make_keys(self, seed: int) -> tuple[int, int]:
        """Returns the keys of (seed, the layer's name)."""
        return key64(seed, self.name), 0

    def _fill(self) -> None:
        assert self.keys is not None
        self._compute(*self.keys)
        self.filled, self._fingerprint = True, None

    @abstractmethod
    def _compute(self, key: int, shift: int) -> None:
        """Computes the buffers from the keys, in place."""

    @abstractmethod
    def row_positions(self, first: int, last: int) -> Tensor:
        """Returns flat positions (i − first)·n + c in rows first … last − 1, in V.flatten()'s order; int32 or int64."""

    @abstractmethod
    def row_values(self, first: int, last: int) -> slice:
        """Returns the slice of V.flatten() that holds the values of rows first … last − 1."""

    def check_filled(self) -> None:
        """Raises a RuntimeError if there are no positions yet; see :attr:`filled`."""
        if not self.filled:
            raise RuntimeError("no positions yet; after to_empty(), call reset_parameters() or load a state dict")

    def indices(self) -> Tensor:
        """Returns the flat positions i·n + c in the order of V.flatten(), int64, on the layer's device."""
        self.check_filled()
        return self.row_positions(0, self.m).long()

    def fingerprint(self) -> str:
        """Returns 16 hex digits that identify the shape and the positions in use on this device."""
        self.check_filled()
        dtype = torch.int32 if position_bytes(self.m, self.n) == 4 else torch.int64
        digest = hashlib.sha256(f"{self.kind}:{self.m}:{self.n}:".encode())
        digest.update(self.row_positions(0, self.m).detach().cpu().to(dtype).numpy().tobytes())
        return digest.hexdigest()[:16]

    def shares_inputs(self, other: Support) -> bool:
        """Returns whether :meth:`arrange_inputs` gives the same for both supports."""
        return self.n == other.n and other.kind != "blocks"

    def add_to_rows_(self, W: Tensor, V: Tensor, first: int, last: int) -> None:
        """Adds rows first … last − 1 of S to the same rows of a weight, W (last − first, n), in place."""
        # index_add_ takes int32 positions as they are: neither W nor the positions are copied.
        values = V.reshape(-1)[self.row_values(first, last)].to(W.dtype)
        W.view(-1).index_add_(0, self.row_positions(first, last), values)

    def take_from_rows(self, G: Tensor, first: int, last: int) -> Tensor:
        """Returns a matrix's entries at the positions in rows first … last − 1, which are G (last − first, n); flat."""
        return G.view(-1).index_select(0, self.row_positions(first, last))

    # Products with S, here for scattered positions: tokens are processed in slices, so that arranged tensors are small
    # and stay in the cache. *Arranged* inputs and outputs, and sums of them, are tensors whose layout only the support
    # knows.

    def step(self, x: Tensor) -> int:
        """Returns the number of tokens in a slice of inputs x."""
        return 2 * SLICE // max(2, x.dtype.itemsize)

    def weights(self, V: Tensor) -> Weights:
        """Returns what :meth:`multiply` needs of the positions and values."""
        rows, columns = self._rows_and_columns()
        return columns, _first_of_each(rows, self.m), V.reshape(-1)

    def transposed_weights(self, V: Tensor) -> Weights:
        """Returns what :meth:`multiply_transposed` needs of the positions and values."""
        rows, columns = self._rows_and_columns()
        columns, order = columns.sort(stable=True)
        return rows.index_select(0, order), _first_of_each(columns, self.n), V.reshape(-1).index_select(0, order)

    def places(self) -> Weights:
        """Returns what :meth:`sample` needs of the positions."""
        rows, columns = self._rows_and_columns()
        return rows, columns, _first_of_each(rows, self.m)

    def arrange_inputs(self, x: Tensor) -> Tensor:
        """Returns inputs x (T, n) in arranged form."""
        return x.t().contiguous()

    def arrange_outputs(self, g: Tensor) -> Tensor:
        """Returns outputs or their gradients g (T, m) in arranged form."""
        return g.t().contiguous()

    def restore_inputs(self, arranged: Tensor, out: Tensor | None = None) -> Tensor:
        """Applies the transpose of :meth:`arrange_inputs`: (T, n), each input's values added up; in `out` or new."""
        return to_tokens_first(arranged, out)

    def sum_over_tokens(self, q: Tensor, inputs: Tensor) -> Tensor:
        """Returns qᵀx, (r, n), for q (T, r) and arranged inputs; only where :attr:`keeps_arranged`."""
        return torch.mm(inputs, q).t()

    def multiply(self, weights: Weights, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns xSᵀ, (T, m), for arranged inputs; in `out` or new."""
        return to_tokens_first(_sum_rows(inputs, *weights), out)

    def multiply_transposed(self, weights: Weights, outputs: Tensor, total: Tensor | None = None) -> Tensor:
        """Returns gS for arranged outputs, plus `total`, which may be overwritten; for :meth:`restore_inputs`."""
        part = _sum_rows(outputs, *weights)
        return part if total is None else total.add_(part)

    def sample(self, places: Weights, outputs: Tensor, inputs: Tensor, total: Tensor | None = None) -> Tensor:
        """Returns gᵀx at the positions, plus `total`, which may be overwritten; for :meth:`sampled`."""
        rows, columns, offsets = places
        if device_type(outputs) == "cuda" and outputs.dtype.itemsize == 2:
            # CUDA's operator supports neither bf16 nor fp16; the slice of tokens is small.
            outputs, inputs = outputs.float(), inputs.float()
        # The gradient of embedding_bag with respect to its weights: a dot product per position, summed in float32.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(outputs, inputs, columns, offsets, rows, 0)
        return add_to_total(total, dots)

    def sampled(self, total: Tensor) -> Tensor:
        """Returns the gradient of V, in its shape, from the total over all slices."""
        return total.view(self.values_shape)

    def extra_repr(self) -> str:
        return f"{self.kind}, nnz={self.nnz}"

    def get_extra_state(self) -> Tensor:
        """Returns the keys and a fingerprint of the positions, (24,) uint8; zeros if there are no positions yet."""
        # Bytes, because state dicts are cast as a whole, and even bfloat16 holds 0 … 255 exactly. Of fixed size and on
        # the parameters' device, because torch.distributed.checkpoint loads in place.
        device = next(self.buffers()).device
        if self.keys is None or not self._has_values():
            return torch.zeros(_STATE.size, dtype=torch.uint8, device=device)
        state = _STATE.pack(*self.keys, self._fingerprint_bytes())
        return torch.frombuffer(bytearray(state), dtype=torch.uint8).to(device)

    def set_extra_state(self, state: Tensor) -> None:
        """Adopts the keys of a state dict if the seed is None, and compares the positions.

        Raises:
            ValueError: The state dict has other positions, or none. The support is unchanged.
        """
        if state.is_meta or isinstance(state, FakeTensor):
            return  # it holds no values to compare, nor do the parameters
        if state.shape != (_STATE.size,):
            raise ValueError(f"its key has the shape {tuple(state.shape)}, not ({_STATE.size},)")
        key, shift, saved = _STATE.unpack(bytes(state.to("cpu", torch.uint8).tolist()))
        if saved == bytes(len(saved)):
            raise ValueError("it was saved before the layer had positions; call reset_parameters() before saving")
        previous = self.keys, self.filled
        if self.seed is None and self.keys != (key, shift):
            self.keys = key, shift
            self._fill()
        if not self._has_values() or self._fingerprint_bytes() == saved:
            return
        or_seedless = ", or with seed=None, which adopts the saved positions"
        if self.seed is None:
            self.keys, self.filled = previous
            if self.keys is not None:
                self._fill()
            or_seedless = ""
        raise ValueError(
            f"its positions (fingerprint {saved.hex()}) are not those of this layer ({self.m}×{self.n}, {self.kind}, "
            f"{self.nnz} positions, seed={self.seed}, name={self.name!r}); create the layer with the shape, density, "
            f"support, name and seed of the saved one{or_seedless}"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        error_msgs = args[-1]
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:  # reported with all other errors, as torch reports mismatched sizes
            error_msgs.append(f"{prefix.rstrip('.') or 'support'}: the state dict does not fit: {error}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers where `fn` moves tensors (`to`, `cuda`, `to_empty` …), and keeps their values."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        was_meta, is_meta = (any(b is not None and b.is_meta for b in bs.values()) for bs in (before, self._buffers))
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new is old:
                continue
            # Not the result of `fn`: to_empty's memory is uninitialised, and type() would cast the positions.
            new = torch.empty_like(old, device=new.device) if was_meta or is_meta else old.to(new.device)
            self._buffers[name] = new
        if was_meta and not is_meta:
            self.filled = self.keys is not None
            if self.filled:
                self._fill()
        return self

    def _fingerprint_bytes(self) -> bytes:
        """Returns the fingerprint, computed once: saving a state dict must not take a pass over all positions."""
        self._fingerprint = self._fingerprint or self.fingerprint()
        return bytes.fromhex(self._fingerprint)

    def _has_values(self) -> bool:
        """Returns whether the buffers hold numbers: they do not on the meta device, nor as fake tensors."""
        return not any(buffer.is_meta or isinstance(buffer, FakeTensor) for buffer in self.buffers())

    def _rows_and_columns(self) -> tuple[Tensor, Tensor]:
        positions = self.row_positions(0, self.m)
        if position_bytes(self.m, self.n) == 4:
            positions = positions.int()  # halves the bytes that are sorted and searched
        rows = positions.div(self.n, rounding_mode="floor")
        return rows, positions - rows * self.n


def flatten_columns(columns: Tensor, n: int) -> Tensor:
    """Returns the flat positions, int64, of columns (rows, k)."""
    rows = torch.arange(columns.shape[0], device=columns.device, dtype=torch.int64)
    return (columns + (rows * n)[:, None]).view(-1)


def _sum_rows(rows: Tensor, which: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Returns weighted sums of the rows `which`, one sum for each segment that begins at an offset."""
    # embedding_bag: torch's only sparse product on the CPU that supports bf16, and its fastest in float32.
    return F.embedding_bag(which, rows, offsets, mode="sum", per_sample_weights=weights)


def add_to_total(total: Tensor | None, part: Tensor) -> Tensor:
    """Adds a slice's gradient of V to the total over slices of tokens, in float32 where its type is narrower."""
    if total is None:
        return part.float() if part.dtype.itemsize == 2 else part
    return total.add_(part)


def to_tokens_first(features: Tensor, out: Tensor | None = None) -> Tensor:
    """Copies features × tokens to (T, features), in `out` or new: always a copy, so that it may be returned."""
    if out is None:
        out = features.new_empty(features.shape[1], features.shape[0])
    return out.copy_(features.t())


def _first_of_each(ordered: Tensor, count: int) -> Tensor:
    """Returns where each of 0 … count − 1 begins in a sorted tensor, in the tensor's type."""
    values = torch.arange(count, device=ordered.device, dtype=ordered.dtype)
    return torch.searchsorted(ordered, values, out_int32=ordered.dtype == torch.int32)
