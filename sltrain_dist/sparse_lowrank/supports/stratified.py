"""The support `stratified`: one value in each of k strata of a row, at a hashed column; stores no index."""

from __future__ import annotations

import torch
from torch import Tensor

from sltrain_dist.numerics.gpu_kernels import use_kernels
from sltrain_dist.numerics.splitmix import key_bytes
from sltrain_dist.sparse_lowrank.kernels.torch_kernels import stratified_add_, stratified_take
from sltrain_dist.sparse_lowrank.sizes import stratum_start
from sltrain_dist.sparse_lowrank.supports.support import Support, flatten_columns

_MASK = 0xFFFFFFFF
# Odd multipliers; those above 2^31 are given as negative numbers, so that a product with 32 bits fits int64.
_ROW_STEP = 0x9E3779B1 - (1 << 32)
_SLOT_STEP = 0x61C88647
_MURMUR_1 = 0x85EBCA6B - (1 << 32)
_MURMUR_2 = 0xC2B2AE35 - (1 << 32)


def stratified_key(seed: int, name: str) -> int:
    """Returns the layer's 32-bit key: the first 4 bytes of SHA-256 of "seed:name", big-endian."""
    return int.from_bytes(key_bytes(seed, name)[:4], "big")


def murmur_finalise(h: int) -> int:
    """Applies MurmurHash3's 32-bit finaliser (Appleby, public domain): an avalanching bijection of 32-bit words."""
    h ^= h >> 16
    h = (h * _MURMUR_1) & _MASK
    h ^= h >> 13
    h = (h * _MURMUR_2) & _MASK
    return h ^ (h >> 16)


def stratified_column(key: int, i: int, j: int, n: int, k: int) -> int:
    """Returns the column of slot j of row i, in Python integers: the definition that every implementation repeats.

    Row i gets a word a = f(key + i·0x9E3779B1), and its slot j gets u = f(a + j·0x61C88647), where f is the finaliser
    and all sums are modulo 2^32; u is mapped into stratum j by multiply-shift, ⌊u·size/2^32⌋.
    """
    word = murmur_finalise((key + i * _ROW_STEP) & _MASK)
    word = murmur_finalise((word + j * _SLOT_STEP) & _MASK)
    start = stratum_start(j, n, k)
    return start + (word * (stratum_start(j + 1, n, k) - start) >> 32)


class StratifiedSupport(Support):
    """k = max(1, ⌊δn + ½⌋) values per row, one in each of k equal strata of columns, chosen by a hash.

    No index is stored: the positions are functions of (key, row, slot), the same to the bit in Python
    (:func:`stratified_column`), in torch on any device, and in the Triton kernels.

    Args: as of :class:`Support`, and
        device: Where :meth:`indices` computes, until the module is moved. On "meta", the key is computed when memory is
            allocated (`to_empty`).

    Attributes:
        key: (1,) int64, the layer's 32-bit key. A tensor, because a number would be a constant of compiled code, which
            layers could then not share.
        k: Number of values in each row.
    """

    kind = "stratified"
    key: Tensor

    def __init__(
        self,
        m: int,
        n: int,
        density: float,
        *,
        seed: int | None = None,
        name: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(m, n, density, seed=seed, name=name)
        self.k = self.values_shape[1]
        self._make_buffers(device, {"key": (1, torch.int64)})

    def _make_keys(self, seed: int) -> tuple[int, int]:
        return stratified_key(seed, self.name), 0

    def _compute(self, key: int, shift: int) -> None:
        self.key.fill_(key % (1 << 32))  # a state dict of another support may have a longer one; it is refused

    def columns(self, first: int, last: int) -> Tensor:
        """Returns the columns of rows first … last − 1, int64 (rows, k)."""
        device = self.key.device
        slots = torch.arange(self.k + 1, device=device)
        starts = (slots * self.n).div_(self.k, rounding_mode="floor")
        rows = torch.arange(first, last, device=device).mul_(_ROW_STEP).add_(self.key).bitwise_and_(_MASK)
        words = _finalise_(rows)[:, None] + slots[:-1] * _SLOT_STEP
        words = _finalise_(words.bitwise_and_(_MASK))
        return words.mul_(starts[1:] - starts[:-1]).bitwise_right_shift_(32).add_(starts[:-1])

    def row_positions(self, first: int, last: int) -> Tensor:
        return flatten_columns(self.columns(first, last), self.n)

    def row_values(self, first: int, last: int) -> slice:
        return slice(first * self.k, last * self.k)

    def add_to_rows_(self, W: Tensor, V: Tensor, first: int, last: int) -> None:
        if use_kernels(W):
            stratified_add_(W, V[first:last].contiguous(), self.key, first)
        else:
            super().add_to_rows_(W, V, first, last)

    def take_from_rows(self, G: Tensor, first: int, last: int) -> Tensor:
        if use_kernels(G):
            return stratified_take(G, self.k, self.key, first).view(-1)
        return super().take_from_rows(G, first, last)


def _finalise_(h: Tensor) -> Tensor:
    """Applies :func:`murmur_finalise` in place, to int64 tensors of 32-bit words."""
    h.bitwise_xor_(h >> 16).mul_(_MURMUR_1).bitwise_and_(_MASK)
    h.bitwise_xor_(h >> 13).mul_(_MURMUR_2).bitwise_and_(_MASK)
    return h.bitwise_xor_(h >> 16)
