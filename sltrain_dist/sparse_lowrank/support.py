"""Supports: the fixed positions of the sparse part S, computed from (seed, layer name), never saved or sent.

A support is a module only so that what it keeps follows the layer to its device; it has no parameters, and
its buffers are not part of a checkpoint. What a checkpoint holds instead is the seed and a fingerprint.

Products with S are taken in an *arranged* form, by default features × tokens, where what belongs to one feature
is contiguous: gathering features is then copying rows, and a row of S adds up rows. Each support has its own
arrangement; layers that share their input arrange it once.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.numerics.splitmix import integers, key64
from sltrain_dist.sparse_lowrank.layout import column_bytes, nonzeros, position_bytes, values_shape

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
"""Most tokens at a time in products with scattered positions, where a number has two bytes; fewer where it has
more: then the features of a wide layer fit a core's cache."""


class Support(nn.Module):
    """What all supports have in common.

    Args:
        m: Rows of W (out_features).
        n: Columns of W (in_features).
        density: δ.
        seed: Seed of the run.
        name: The layer's construction name, such as model.layers.0.self_attn.q_proj.

    Attributes:
        nnz: Number of positions.
        values_shape: Shape of V: (nnz,) for random, else (m, k), V[i] belonging to output i.

    Raises:
        ValueError: The density is outside (0, 1], or leaves no position.
    """

    kind: SupportKind
    keeps_arranged = False

    def __init__(self, m: int, n: int, density: float, *, seed: int = 0, name: str = "") -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ValueError(f"density = {density} is outside (0, 1]")
        self.m, self.n, self.seed, self.name = m, n, seed, name
        self.nnz = nonzeros(m, n, density, self.kind)
        self.values_shape = values_shape(m, n, density, self.kind)
        if self.nnz == 0:
            raise ValueError(f"density = {density} leaves no position in a {m}×{n} layer; raise it, or drop S")

    @abstractmethod
    def reset(self) -> None:
        """Computes what is kept, in place, on the device where the buffers are."""

    @abstractmethod
    def row_positions(self, first: int, last: int) -> Tensor:
        """Flat positions (i − first)·n + c in rows first … last − 1, as V.flatten() has them; int32 or int64."""

    @abstractmethod
    def row_values(self, first: int, last: int) -> slice:
        """Where V.flatten() has the values of rows first … last − 1."""

    def indices(self) -> Tensor:
        """Flat positions i·n + c in the order of V.flatten(), int64, on the layer's device."""
        return self.row_positions(0, self.m).long()

    def fingerprint(self) -> str:
        """16 hex digits over the shape and the positions that are in use on this device."""
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
        if outputs.is_cuda and outputs.dtype.itemsize == 2:
            # CUDA's operator knows neither bf16 nor fp16; the slice of tokens is small.
            outputs, inputs = outputs.float(), inputs.float()
        # The gradient of embedding_bag by its weights: a dot product per position, summed in float32.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(outputs, inputs, columns, offsets, rows, 0)
        return summed(total, dots)

    def sampled(self, total: Tensor) -> Tensor:
        return total.view(self.values_shape)

    def extra_repr(self) -> str:
        return f"{self.kind}, nnz={self.nnz}"

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


def random_positions(m: int, n: int, nnz: int, seed: int, name: str) -> npt.NDArray[np.signedinteger]:
    """Draws `nnz` of the m·n flat positions, uniformly and without replacement.

    Draws from the keyed stream are taken one after another, and repeated positions ignored, until `nnz` are
    distinct; by symmetry every set is equally likely. Above a density of one half the positions that are
    left out are drawn instead.

    Returns:
        Sorted positions i·n + c; int32, or int64 where m·n ≥ 2^31.
    """
    size, key = m * n, key64(seed, name)
    draw = min(nnz, size - nnz)
    taken = np.zeros(size, dtype=np.bool_)
    counter, distinct = 0, 0
    while distinct < draw:  # each round asks for exactly what is missing, so it can never take too many
        taken[integers(key, counter, draw - distinct, size)] = True
        counter += draw - distinct
        distinct = int(np.count_nonzero(taken))
    if draw < nnz:
        np.logical_not(taken, out=taken)
    dtype = np.int32 if position_bytes(m, n) == 4 else np.int64
    return np.flatnonzero(taken).astype(dtype)


class RandomSupport(Support):
    """The paper's support: exactly int(δ·m·n) positions, uniform without replacement (arXiv 2406.02214).

    What is kept are the columns and each row's number of values, half of what flat positions take; these are put
    together again where they are used, in an eighth of the time that adding values at them takes (docs/operator.md).

    Args: as of :class:`Support`, and
        device: Where the columns live. On "meta" they are computed by :meth:`reset`.

    Attributes:
        columns: (nnz,) in the order of the positions, int16 (int32 where n > 2^15).
        row_counts: (m,) int32, values of every row.
    """

    kind = "random"
    columns: Tensor
    row_counts: Tensor

    def __init__(
        self, m: int, n: int, density: float, *, seed: int = 0, name: str = "", device: torch.device | str | None = None
    ) -> None:
        super().__init__(m, n, density, seed=seed, name=name)
        dtype = torch.int16 if column_bytes(n) == 2 else torch.int32
        device = torch.device(device or torch.get_default_device())
        self.register_buffer("columns", torch.empty(self.nnz, dtype=dtype, device=device), persistent=False)
        self.register_buffer("row_counts", torch.empty(m, dtype=torch.int32, device=device), persistent=False)
        # Values before each row, on the host, for row blocks; until the positions exist, what is expected.
        self._before_row: list[int] = [self.nnz * i // m for i in range(m + 1)]
        if device.type != "meta":
            self.reset()

    def reset(self) -> None:
        """Computes the positions in place, on the device where the buffers are."""
        positions = random_positions(self.m, self.n, self.nnz, self.seed, self.name)
        before_row = np.searchsorted(positions, np.arange(self.m + 1, dtype=np.int64) * self.n)
        self._before_row = before_row.tolist()
        self.columns.copy_(torch.from_numpy(positions % self.n))
        self.row_counts.copy_(torch.from_numpy(np.diff(before_row)))

    def row_positions(self, first: int, last: int) -> Tensor:
        dtype = torch.int32 if position_bytes(self.m, self.n) == 4 else torch.int64
        starts = torch.arange(last - first, dtype=dtype, device=self.columns.device).mul_(self.n)
        return self._by_row(starts, first, last).add_(self.columns[self.row_values(first, last)])

    def row_values(self, first: int, last: int) -> slice:
        return slice(self._before_row[first], self._before_row[last])

    def _by_row(self, numbers: Tensor, first: int, last: int) -> Tensor:
        """Each row's number, for each of its values."""
        values = self.row_values(first, last)
        return numbers.repeat_interleave(self.row_counts[first:last], output_size=values.stop - values.start)

    def _rows_and_columns(self) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self.m, dtype=torch.int32, device=self.columns.device)
        return self._by_row(rows, 0, self.m), self.columns.int()
