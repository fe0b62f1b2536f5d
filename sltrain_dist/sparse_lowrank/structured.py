"""The two supports with equally many values in every row: `stratified`, which stores no index, and `blocks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sltrain_dist.numerics.keyed import key64, key_bytes, permutation
from sltrain_dist.sparse_lowrank.layout import num_windows, stratum_start, window_row_bounds, window_starts
from sltrain_dist.sparse_lowrank.support import Support

_MASK = 0xFFFFFFFF
# All multipliers are odd, and given as negative numbers above 2^31: then a product with 32 bits fits int64.
_ROW_STEP = 0x9E3779B1 - (1 << 32)
_SLOT_STEP = 0x61C88647
_MURMUR_1 = 0x85EBCA6B - (1 << 32)
_MURMUR_2 = 0xC2B2AE35 - (1 << 32)


def stratified_key(seed: int, name: str) -> int:
    """The layer's 32-bit key: the first 4 bytes of SHA-256 of "seed:name", big-endian."""
    return int.from_bytes(key_bytes(seed, name)[:4], "big")


def murmur_finalise(h: int) -> int:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain): a bijection of 32-bit words that avalanches."""
    h ^= h >> 16
    h = (h * _MURMUR_1) & _MASK
    h ^= h >> 13
    h = (h * _MURMUR_2) & _MASK
    return h ^ (h >> 16)


def stratified_column(key: int, i: int, j: int, n: int, k: int) -> int:
    """Column of slot j of row i, in Python integers: the definition, which every implementation repeats.

    Row i draws a word a = f(key + i·0x9E3779B1), slot j of it u = f(a + j·0x61C88647), f the finaliser and
    all sums modulo 2^32; u is mapped into stratum j by multiply-shift, ⌊u·size/2^32⌋.
    """
    word = murmur_finalise((key + i * _ROW_STEP) & _MASK)
    word = murmur_finalise((word + j * _SLOT_STEP) & _MASK)
    start = stratum_start(j, n, k)
    return start + (word * (stratum_start(j + 1, n, k) - start) >> 32)


class StratifiedSupport(Support):
    """k = max(1, ⌊δn + ½⌋) values a row, one in each of k equal stretches of columns, chosen by a hash.

    Nothing is stored: the positions are functions of (seed, name, row, slot), the same to the bit in Python
    (:func:`stratified_column`), in torch on any device, and in the Triton kernels.

    Args: as of :class:`Support`, and
        device: Where :meth:`indices` computes, until the module is moved.

    Attributes:
        key: 32-bit key of the layer.
        k: Values in each row.
    """

    kind = "stratified"
    _here: Tensor

    def __init__(
        self, m: int, n: int, density: float, *, seed: int = 0, name: str = "", device: torch.device | str | None = None
    ) -> None:
        super().__init__(m, n, density, seed=seed, name=name)
        self.k = self.values_shape[1]
        self.key = stratified_key(seed, name)
        self.register_buffer("_here", torch.empty(0, device=device), persistent=False)  # follows the layer

    def reset(self) -> None:
        """Does nothing: there is nothing to keep."""

    def columns(self, first: int, last: int) -> Tensor:
        """Columns of rows first … last − 1, int64 (rows, k)."""
        device = self._here.device
        slots = torch.arange(self.k + 1, device=device)
        starts = (slots * self.n).div_(self.k, rounding_mode="floor")
        rows = torch.arange(first, last, device=device).mul_(_ROW_STEP).add_(self.key).bitwise_and_(_MASK)
        words = _finalise_(rows)[:, None] + slots[:-1] * _SLOT_STEP
        words = _finalise_(words.bitwise_and_(_MASK))
        return words.mul_(starts[1:] - starts[:-1]).bitwise_right_shift_(32).add_(starts[:-1])

    def row_positions(self, first: int, last: int) -> Tensor:
        return _flatten_columns(self.columns(first, last), self.n)

    def row_values(self, first: int, last: int) -> slice:
        return slice(first * self.k, last * self.k)


def input_key(name: str) -> str:
    """The name that keys the permutation of a layer's inputs: that of the module which holds the layer.

    Layers of one module, such as q, k and v, share the permutation, so that their common input is permuted
    once; the permutations of their outputs are their own.
    """
    return name.rpartition(".")[0]


Order = Literal["random", "grouped", "strided"]
"""How a permutation is made. random: uniform. grouped: runs of 8 neighbours, in random order. strided:
neighbours are dealt out to the windows in turn. The last two are for comparisons."""
_GROUP = 8


def make_order(order: Order, key: int, size: int, windows: int) -> npt.NDArray[np.int64]:
    """A permutation of 0 … size − 1, as the list of what comes at each place."""
    if order == "random":
        return permutation(key, size)
    if order == "strided":
        return np.argsort(np.arange(size) % windows, kind="stable")
    groups = np.arange(size) // _GROUP
    return np.argsort(permutation(key, int(groups[-1]) + 1)[groups], kind="stable")


class BlockSupport(Support):
    """Dense blocks between permuted inputs and permuted outputs.

    The permuted inputs are covered by w = ⌈n/k⌉ windows of k, spread evenly, so that an input lies in one
    or two; permuted output p uses window ⌊p·w/m⌋. The product with S is then w small dense products.

    Args: as of :class:`Support`, and
        device: Where the permutations live. On "meta" they are computed by :meth:`reset`.
        orders: How the permutations of (inputs, outputs) are made.

    Attributes:
        k: Values in each row, the width of a window.
        windows: w.
        inputs: (n,) int32, the input at each permuted place.
        outputs: (m,) int32, the output at each permuted place.
        input_places: (n,) int32, the inverse of `inputs`.
        output_places: (m,) int32, the inverse of `outputs`.
        starts: First permuted input of each window.
        row_bounds: Window i is used by the permuted outputs row_bounds[i] … row_bounds[i + 1] − 1.
    """

    kind = "blocks"
    inputs: Tensor
    outputs: Tensor
    input_places: Tensor
    output_places: Tensor

    def __init__(
        self,
        m: int,
        n: int,
        density: float,
        *,
        seed: int = 0,
        name: str = "",
        device: torch.device | str | None = None,
        orders: tuple[Order, Order] = ("random", "random"),
    ) -> None:
        super().__init__(m, n, density, seed=seed, name=name)
        self.k = self.values_shape[1]
        self.windows = num_windows(n, self.k)
        self.orders = orders
        self.starts: Sequence[int] = window_starts(n, self.k)
        self.row_bounds: Sequence[int] = window_row_bounds(m, self.windows)
        device = torch.device(device or torch.get_default_device())
        for buffer, size in (("inputs", n), ("input_places", n), ("outputs", m), ("output_places", m)):
            self.register_buffer(buffer, torch.empty(size, dtype=torch.int32, device=device), persistent=False)
        if device.type != "meta":
            self.reset()

    def reset(self) -> None:
        """Computes the permutations in place, on the device where the buffers are."""
        input_order, output_order = self.orders
        inputs = make_order(input_order, key64(self.seed, f"{input_key(self.name)}.inputs"), self.n, self.windows)
        outputs = make_order(output_order, key64(self.seed, f"{self.name}.outputs"), self.m, self.windows)
        for order, buffer, inverse in (
            (inputs, self.inputs, self.input_places),
            (outputs, self.outputs, self.output_places),
        ):
            buffer.copy_(torch.from_numpy(order))
            inverse.copy_(torch.from_numpy(np.argsort(order)))

    def columns(self, first: int, last: int) -> Tensor:
        """Columns of rows first … last − 1, int32 (rows, k)."""
        places, device = torch.arange(self.k, device=self.inputs.device), self.inputs.device
        starts = torch.tensor(self.starts, device=device)
        window_columns = self.inputs[starts[:, None] + places]
        windows = self.output_places[first:last].long().mul_(self.windows).div_(self.m, rounding_mode="floor")
        return window_columns.index_select(0, windows)

    def row_positions(self, first: int, last: int) -> Tensor:
        return _flatten_columns(self.columns(first, last), self.n)

    def row_values(self, first: int, last: int) -> slice:
        return slice(first * self.k, last * self.k)


def _finalise_(h: Tensor) -> Tensor:
    """:func:`murmur_finalise` in place, on int64 tensors of 32-bit words."""
    h.bitwise_xor_(h >> 16).mul_(_MURMUR_1).bitwise_and_(_MASK)
    h.bitwise_xor_(h >> 13).mul_(_MURMUR_2).bitwise_and_(_MASK)
    return h.bitwise_xor_(h >> 16)


def _flatten_columns(columns: Tensor, n: int) -> Tensor:
    rows = torch.arange(columns.shape[0], device=columns.device, dtype=torch.int64)
    return (columns + (rows * n)[:, None]).view(-1)
