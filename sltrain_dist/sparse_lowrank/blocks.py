"""The support `blocks`: dense blocks between permuted inputs and permuted outputs."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sltrain_dist.numerics.splitmix import key64, permutation
from sltrain_dist.sparse_lowrank.kernels import BlockProducts, use_kernels
from sltrain_dist.sparse_lowrank.layout import num_windows, window_row_bounds, window_starts
from sltrain_dist.sparse_lowrank.support import Products, Support, Weights, flatten_columns, summed, untransposed

Order = Literal["random", "grouped", "strided"]
"""How a permutation is made. random: uniform. grouped: runs of 8 neighbours, in random order. strided:
neighbours are dealt out to the windows in turn. The last two are for comparisons."""
_GROUP = 8
_SLICE = 256
"""Tokens at a time on the CPU: what is arranged, of the widest layers too, then stays in a core's cache. Twice as
many are up to a fifth slower there (docs/operator.md)."""


def input_key(name: str) -> str:
    """The name that keys the permutation of a layer's inputs: that of the module which holds the layer.

    Layers of one module, such as q, k and v, share the permutation, so that their common input is permuted
    once; the permutations of their outputs are their own.
    """
    return name.rpartition(".")[0]


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
    or two; permuted output p uses window ⌊p·w/m⌋, so that a window has R = ⌈m/w⌉ outputs, or one less. The
    product with S is then a batch of w products of (R, k) blocks. What is stored are the permutations, as
    lists of places: O(m + n).

    Args: as of :class:`Support`, and
        device: Where the permutations live. On "meta" they are computed by :meth:`reset`.
        orders: How the permutations of (inputs, outputs) are made.

    Attributes:
        k: Values in each row, the width of a window.
        windows: w.
        rows: R; windows with one output less repeat their last one, and its values count as 0.
        window_inputs: (w·k,) int32, the inputs of every window.
        window_outputs: (w·R,) int32, the outputs of every window.
        input_places: (n,) int32, where in `window_inputs` an input comes first.
        second_places: (w·k − n,) int32, the places in `window_inputs` of inputs that an earlier window has.
        output_places: (m,) int32, where in `window_outputs` an output comes.
    """

    kind = "blocks"
    window_inputs: Tensor
    window_outputs: Tensor
    input_places: Tensor
    second_places: Tensor
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
        self.rows = -(-m // self.windows)
        self.orders = orders
        sizes = {
            "window_inputs": self.windows * self.k,
            "window_outputs": self.windows * self.rows,
            "input_places": n,
            "second_places": self.windows * self.k - n,
            "output_places": m,
        }
        device = torch.device(device or torch.get_default_device())
        for buffer, size in sizes.items():
            self.register_buffer(buffer, torch.empty(size, dtype=torch.int32, device=device), persistent=False)
        if device.type != "meta":
            self.reset()

    def reset(self) -> None:
        """Computes the permutations in place, on the device where the buffers are."""
        input_order, output_order = self.orders
        inputs = make_order(input_order, key64(self.seed, f"{input_key(self.name)}.inputs"), self.n, self.windows)
        outputs = make_order(output_order, key64(self.seed, f"{self.name}.outputs"), self.m, self.windows)

        # Permuted input at every place of every window; the first time that it comes is its place.
        starts = np.asarray(window_starts(self.n, self.k))
        permuted = (starts[:, None] + np.arange(self.k)).ravel()
        first_places = np.unique(permuted, return_index=True)[1]
        self._fill(self.window_inputs, inputs[permuted])
        self._fill(self.input_places, first_places[np.argsort(inputs)])
        self._fill(self.second_places, np.setdiff1d(np.arange(permuted.size), first_places))

        # A window with fewer outputs than R repeats its last; one with none takes whichever.
        bounds = np.asarray(window_row_bounds(self.m, self.windows))
        wanted = bounds[:-1, None] + np.arange(self.rows)
        permuted = np.clip(np.minimum(wanted, bounds[1:, None] - 1), 0, self.m - 1)
        self._fill(self.window_outputs, outputs[permuted.ravel()])
        places = np.flatnonzero((wanted < bounds[1:, None]).ravel())
        self._fill(self.output_places, places[np.argsort(outputs)])

    def columns(self, first: int, last: int) -> Tensor:
        """Columns of rows first … last − 1, int32 (rows, k)."""
        windows = self.output_places[first:last].div(self.rows, rounding_mode="floor")
        return self.window_inputs.view(self.windows, self.k).index_select(0, windows)

    def row_positions(self, first: int, last: int) -> Tensor:
        return flatten_columns(self.columns(first, last), self.n)

    def row_values(self, first: int, last: int) -> slice:
        return slice(first * self.k, last * self.k)

    def shares_inputs(self, other: Support) -> bool:
        return (
            isinstance(other, BlockSupport)
            and (self.n, self.k, self.seed, self.orders[0]) == (other.n, other.k, other.seed, other.orders[0])
            and input_key(self.name) == input_key(other.name)
        )

    def products(self, x: Tensor) -> Products:
        return BlockProducts(self, x.shape[0]) if use_kernels(x) else self

    # Arranged matrices are (w, T, width), as a view of (T, w·width): the windows of every token side by side, so
    # that features are picked in one pass, before and after. Where :func:`by_features`, (w, width, T).

    def step(self, x: Tensor) -> int:
        return _SLICE if x.device.type == "cpu" else max(1, x.shape[0])

    def weights(self, V: Tensor) -> Weights:
        blocks = V.index_select(0, self.window_outputs).view(self.windows, self.rows, self.k)
        return (blocks,)

    def transposed_weights(self, V: Tensor) -> Weights:
        (blocks,) = self.weights(V)
        if self.windows * self.rows != self.m:
            window = torch.arange(self.windows + 1, device=V.device)
            bounds = (window * self.m + self.windows - 1).div_(self.windows, rounding_mode="floor")
            short = bounds[1:] - bounds[:-1] < self.rows
            blocks[:, -1].masked_fill_(short[:, None], 0)
        return (blocks,)

    def places(self) -> Weights:
        return ()

    def arrange_inputs(self, x: Tensor) -> Tensor:
        return _arrange(x, self.window_inputs, self.windows)

    def arrange_outputs(self, g: Tensor) -> Tensor:
        return _arrange(g, self.window_outputs, self.windows)

    def restore_inputs(self, arranged: Tensor, out: Tensor | None = None) -> Tensor:
        flat, features = _side_by_side(arranged)
        twice = self.second_places.numel() > 0
        if features == 0:
            x = flat.index_select(0, self.input_places)
        else:
            x = torch.index_select(flat, 1, self.input_places, out=out)
        if twice:
            which = self.window_inputs.index_select(0, self.second_places)
            x.index_add_(features, which, flat.index_select(features, self.second_places))
        return untransposed(x, out) if features == 0 else x

    def multiply(self, weights: Weights, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        (blocks,) = weights
        if by_features(inputs):
            y = torch.bmm(blocks, inputs).flatten(0, 1)
            return untransposed(y.index_select(0, self.output_places), out)
        y = _multiply(inputs, blocks.transpose(1, 2))
        return torch.index_select(_side_by_side(y)[0], 1, self.output_places, out=out)

    def multiply_transposed(self, weights: Weights, outputs: Tensor, total: Tensor | None = None) -> Tensor:
        (blocks,) = weights
        factors = (blocks.transpose(1, 2), outputs) if by_features(outputs) else (outputs, blocks)
        return _multiply(*factors) if total is None else total.baddbmm_(*factors)

    def sample(self, places: Weights, outputs: Tensor, inputs: Tensor, total: Tensor | None = None) -> Tensor:
        if by_features(outputs):
            return summed(total, torch.bmm(outputs, inputs.transpose(1, 2)))
        factors = (outputs.transpose(1, 2), inputs)
        return torch.bmm(*factors) if total is None else total.baddbmm_(*factors)

    def sampled(self, total: Tensor) -> Tensor:
        return total.view(-1, self.k).index_select(0, self.output_places)

    @staticmethod
    def _fill(buffer: Tensor, values: npt.NDArray[np.int64]) -> None:
        buffer.copy_(torch.from_numpy(values))


# Which way to pick features is fastest on the CPU was measured (docs/operator.md): in two bytes, transposing,
# copying rows, and transposing back; in more, index_select along the features of a few tokens at a time.


def by_features(x: Tensor) -> bool:
    """Whether arranged matrices of x's type and device have the tokens last."""
    return x.device.type == "cpu" and x.dtype.itemsize == 2


def _arrange(x: Tensor, columns: Tensor, windows: int) -> Tensor:
    """x[:, columns], (T, w·width), as (w, T, width), or as (w, width, T) where :func:`by_features`."""
    if by_features(x):
        return x.t().contiguous().index_select(0, columns).unflatten(0, (windows, -1))
    return x.index_select(1, columns).unflatten(1, (windows, -1)).transpose(0, 1)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Products (w, ·, ·) of arranged windows and blocks, arranged."""
    if by_features(left) or torch.compiler.is_compiling():  # torch 2.13 cannot trace a product into a view
        return torch.bmm(left, right)
    windows, tokens, width = left.shape[0], left.shape[1], right.shape[2]
    out = left.new_empty(tokens, windows * width).unflatten(1, (windows, -1)).transpose(0, 1)
    return torch.bmm(left, right, out=out)


def _side_by_side(arranged: Tensor) -> tuple[Tensor, int]:
    """(T, w·width), or (w·width, T) where :func:`by_features`, of arranged windows; and which are the features."""
    return (arranged.flatten(0, 1), 0) if by_features(arranged) else (arranged.transpose(0, 1).flatten(1), 1)
