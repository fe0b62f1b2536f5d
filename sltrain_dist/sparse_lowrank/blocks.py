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
from sltrain_dist.sparse_lowrank.support import Arranged, Products, Support, flatten_columns, untransposed

Order = Literal["random", "grouped", "strided"]
"""How a permutation is made. random: uniform. grouped: runs of 8 neighbours, in random order. strided:
neighbours are dealt out to the windows in turn. The last two are for comparisons."""
_GROUP = 8
_SLICE = 256
"""Tokens at a time, where features are picked one by one."""


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

    def arrange_inputs(self, x: Tensor) -> Arranged:
        """The inputs of every window: (w, T, k), or (w, k, T) where :func:`by_features`."""
        return [_arrange(x, self.window_inputs, self.windows)]

    def arrange_outputs(self, g: Tensor) -> Arranged:
        """The outputs of every window: (w, T, R), or (w, R, T) where :func:`by_features`."""
        return [_arrange(g, self.window_outputs, self.windows)]

    def restore_inputs(self, arranged: Arranged) -> Tensor:
        x = _pick_places(arranged[0], self.input_places)
        if self.second_places.numel():
            twice = self.window_inputs.index_select(0, self.second_places)
            x.index_add_(1, twice, _pick_places(arranged[0], self.second_places))
        return x

    def multiply(self, V: Tensor, inputs: Arranged) -> Tensor:
        blocks, x = self._value_blocks(V), inputs[0]
        y = torch.bmm(blocks, x) if by_features(x) else torch.bmm(x, blocks.transpose(1, 2))
        return _pick_places(y, self.output_places)

    def multiply_transposed(self, V: Tensor, outputs: Arranged, total: Arranged | None = None) -> Arranged:
        blocks, g = self._value_blocks(V), outputs[0]
        if self.windows * self.rows != self.m:
            window = torch.arange(self.windows + 1, device=V.device)
            bounds = (window * self.m + self.windows - 1).div_(self.windows, rounding_mode="floor")
            short = bounds[1:] - bounds[:-1] < self.rows
            blocks[:, -1].masked_fill_(short[:, None], 0)
        factors = (blocks.transpose(1, 2), g) if by_features(g) else (g, blocks)
        return [torch.bmm(*factors) if total is None else total[0].baddbmm_(*factors)]

    def sample(self, outputs: Arranged, inputs: Arranged) -> Tensor:
        g, x = outputs[0], inputs[0]
        factors = (g, x.transpose(1, 2)) if by_features(g) else (g.transpose(1, 2), x)
        return torch.bmm(*factors).view(-1, self.k).index_select(0, self.output_places)

    def _value_blocks(self, V: Tensor) -> Tensor:
        return V.index_select(0, self.window_outputs).view(self.windows, self.rows, self.k)

    @staticmethod
    def _fill(buffer: Tensor, values: npt.NDArray[np.int64]) -> None:
        buffer.copy_(torch.from_numpy(values))


# Which way to pick features is fastest on the CPU was measured (docs/operator.md): in two bytes, transposing,
# copying rows, and transposing back; in more, picking a few tokens at a time, so that what is read stays in the
# cache. There index_select is the faster, but it would copy a strided source first, which gather does not.


def by_features(x: Tensor) -> bool:
    """Whether arranged matrices of x's type and device have the tokens last."""
    return x.device.type == "cpu" and x.dtype.itemsize == 2


def _arrange(x: Tensor, columns: Tensor, windows: int) -> Tensor:
    """x[:, columns], (T, w·width), as (w, T, width), or as (w, width, T) where :func:`by_features`."""
    if by_features(x):
        return x.t().contiguous().index_select(0, columns).unflatten(0, (windows, -1))
    if x.device.type == "cpu":
        picked = x.new_empty(x.shape[0], columns.shape[0])
        for part, out in zip(x.split(_SLICE), picked.split(_SLICE), strict=True):
            torch.index_select(part, 1, columns, out=out)
    else:
        picked = x.index_select(1, columns)
    return picked.unflatten(1, (windows, -1)).transpose(0, 1)


def _pick_places(windows: Tensor, places: Tensor) -> Tensor:
    """(T, len(places)): the features at `places` of contiguous windows, counted over windows and widths."""
    if by_features(windows):
        return untransposed([windows.flatten(0, 1).index_select(0, places)])
    w, tokens, width = windows.shape
    # Seen with rows of `width` that overlap, feature q of window b is column b·T·width + q of every token.
    rows = windows.as_strided((tokens, (w - 1) * tokens * width + width), (width, 1))
    within = places.remainder(width)
    columns = (places - within).long() * tokens + within
    if windows.device.type != "cpu":
        return rows.gather(1, columns.expand(tokens, -1))
    picked = windows.new_empty(tokens, places.shape[0])
    for part, out in zip(rows.split(_SLICE), picked.split(_SLICE), strict=True):
        torch.gather(part, 1, columns.expand(part.shape[0], -1), out=out)
    return picked
