"""The support `blocks`: dense blocks between windows of permuted inputs and runs of outputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sltrain_dist.numerics.device import device_type
from sltrain_dist.numerics.splitmix import key64, permutation
from sltrain_dist.sparse_lowrank.sizes import BLOCK_SLICE, num_windows, window_runs, window_starts
from sltrain_dist.sparse_lowrank.supports.support import (
    Support,
    Weights,
    add_to_total,
    flatten_columns,
    to_tokens_first,
)


def input_key(name: str) -> str:
    """Returns the name that keys the permutation of a layer's inputs: that of the module which contains the layer.

    Layers of one module, such as q, k and v, share the permutation, so that their common input is permuted once.
    """
    return name.rpartition(".")[0]


def first_window(name: str, windows: int) -> int:
    """Returns the window that a layer's first outputs use, by the last part of its name, such as up_proj.

    Layers that share their inputs then use different windows for the same outputs, which are multiplied or added up (q,
    k and v; gate and up). Layers of the same last name use the same window: all decoder layers compile to one trace.
    """
    return key64(0, f"{name.rpartition('.')[2]}.start") * windows >> 64  # far apart for LLaMA's names


class BlockSupport(Support):
    """Dense blocks between windows of permuted inputs and runs of neighbouring outputs.

    The permuted inputs are covered by w = ⌈n/k⌉ windows of k inputs, spread evenly, so that an input lies in one or two
    of them. The outputs, in their own order, form w runs of R = ⌈m/w⌉ or R − 1; run j uses window (j + shift) mod w.
    The product with S is then a batch of w products with (R, k) blocks, whose results are in the order of the outputs.
    Only the permutation is stored, as lists of places: O(n).

    Args: as of :class:`Support`, and
        device: Device of the permutation. On "meta", it is computed when memory is allocated (`to_empty`).

    Attributes:
        k: Number of values in each row, the width of a window.
        windows: w.
        shift: See :func:`first_window`.
        runs: The runs, equal ones together: see :func:`window_runs`.
        window_inputs: (w·k,) int32, the inputs of every window.
        input_places: (n,) int32, the first place of each input in `window_inputs`.
        second_places: (w·k − n,) int32, the places in `window_inputs` of inputs that an earlier window has, too.
    """

    kind = "blocks"
    window_inputs: Tensor
    input_places: Tensor
    second_places: Tensor

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
        self.windows = num_windows(n, self.k)
        self._set_runs(first_window(name, self.windows))
        places = self.windows * self.k
        sizes = {"window_inputs": places, "input_places": n, "second_places": places - n}
        self._make_buffers(device, {buffer: (size, torch.int32) for buffer, size in sizes.items()})

    def _make_keys(self, seed: int) -> tuple[int, int]:
        windows = num_windows(self.n, self.values_shape[1])
        return key64(seed, f"{input_key(self.name)}.inputs"), first_window(self.name, windows)

    def _set_runs(self, shift: int) -> None:
        self.shift = shift % self.windows  # a state dict of a larger layer may exceed it; its fingerprint is refused
        self.runs = window_runs(self.m, self.windows, self.shift)

    def _compute(self, key: int, shift: int) -> None:
        self._set_runs(shift)
        inputs = permutation(key, self.n)

        # Permuted input at every place of every window; its first occurrence is its place.
        starts = np.asarray(window_starts(self.n, self.k))
        permuted = (starts[:, None] + np.arange(self.k)).ravel()
        first_places = np.unique(permuted, return_index=True)[1]
        self._write(self.window_inputs, inputs[permuted])
        self._write(self.input_places, first_places[np.argsort(inputs)])
        self._write(self.second_places, np.setdiff1d(np.arange(permuted.size), first_places))

    def columns(self, first: int, last: int) -> Tensor:
        """Returns the columns of rows first … last − 1, int32 (rows, k)."""
        # The window of each row: one number per row, where all columns would be one per value.
        windows = []
        for run, rows, each in self.runs:
            rows_here = range(max(first, rows.start), min(last, rows.stop))
            offsets = torch.arange(len(rows_here), device=self.window_inputs.device) + (rows_here.start - rows.start)
            windows.append(offsets.div_(each, rounding_mode="floor").add_(run.start))
        return self.window_inputs.view(self.windows, self.k).index_select(0, torch.cat(windows))

    def row_positions(self, first: int, last: int) -> Tensor:
        return flatten_columns(self.columns(first, last), self.n)

    def row_values(self, first: int, last: int) -> slice:
        return slice(first * self.k, last * self.k)

    def shares_inputs(self, other: Support) -> bool:
        if not isinstance(other, BlockSupport):
            return False
        if (self.n, self.k) != (other.n, other.k):
            return False
        if torch.compiler.is_compiling():
            # Layers of one seed that are applied together must belong to one module, as in the models: a name or a key
            # in the trace would recompile every decoder layer, up to torch's limit of eight.
            return self.seed is not None and self.seed == other.seed
        return self.keys is not None and other.keys is not None and self.keys[0] == other.keys[0]

    # Arranged inputs are (w, T, k), a view of (T, w·k): the windows of every token side by side, so that features are
    # gathered in one pass. Where :func:`by_features`, they are (w, k, T). Outputs are unchanged, or transposed.

    keeps_arranged = True

    def step(self, x: Tensor) -> int:
        return max(1, x.shape[0])

    def weights(self, V: Tensor) -> Weights:
        return (V,)

    def transposed_weights(self, V: Tensor) -> Weights:
        return (V,)

    def places(self) -> Weights:
        return ()

    def arrange_inputs(self, x: Tensor) -> Tensor:
        if by_features(x):
            return x.t().contiguous().index_select(0, self.window_inputs).unflatten(0, (-1, self.k))
        return _side_by_side(_gather(x, self.window_inputs), self.k)

    def arrange_outputs(self, g: Tensor) -> Tensor:
        return g.t().contiguous() if by_features(g) else g

    def restore_inputs(self, arranged: Tensor, out: Tensor | None = None) -> Tensor:
        if by_features(arranged):
            flat, features = arranged.flatten(0, 1), 0
            x = flat.index_select(0, self.input_places)
        else:
            flat, features = arranged.transpose(0, 1).flatten(1), 1
            x = _gather(flat, self.input_places, out)
        if self.second_places.numel() > 0:
            which = self.window_inputs.index_select(0, self.second_places)
            x.index_add_(features, which, flat.index_select(features, self.second_places))
        return to_tokens_first(x, out) if features == 0 else x

    def sum_over_tokens(self, q: Tensor, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(0, 1).t() if by_features(inputs) else inputs.transpose(0, 1).flatten(1)
        return torch.mm(q.t(), flat).index_select(1, self.input_places)

    def multiply(self, weights: Weights, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        windows = inputs.transpose(1, 2) if by_features(inputs) else inputs
        y = inputs.new_empty(windows.shape[1], self.m) if out is None else out
        for run, rows, each in self.runs:
            block = weights[0][rows].unflatten(0, (-1, each))
            _product(windows[run], block.transpose(1, 2), _side_by_side(y[:, rows], each))
        return y

    def multiply_transposed(self, weights: Weights, outputs: Tensor, total: Tensor | None = None) -> Tensor:
        new = total is None
        if total is None:
            total = self._new_total(outputs)
        for run, rows, each in self.runs:
            block = weights[0][rows].unflatten(0, (-1, each))
            if by_features(outputs):
                factors = (block.transpose(1, 2), outputs[rows].unflatten(0, (-1, each)))
            else:
                factors = (_side_by_side(outputs[:, rows], each), block)
            _product(*factors, total[run], add=not new)
        return total

    def sample(self, places: Weights, outputs: Tensor, inputs: Tensor, total: Tensor | None = None) -> Tensor:
        if by_features(outputs):
            dV = outputs.new_empty(self.values_shape)
            for run, rows, each in self.runs:
                block = dV[rows].unflatten(0, (-1, each))
                _product(outputs[rows].unflatten(0, (-1, each)), inputs[run].transpose(1, 2), block)
            return add_to_total(total, dV)
        dV = outputs.new_empty(self.values_shape) if total is None else total
        tokens = max(1, outputs.shape[0])
        step = BLOCK_SLICE if device_type(outputs) == "cpu" and not torch.compiler.is_compiling() else tokens
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            for run, rows, each in self.runs:
                factors = (_side_by_side(outputs[part, rows], each).transpose(1, 2), inputs[run, part])
                _product(*factors, dV[rows].unflatten(0, (-1, each)), add=first > 0 or total is not None)
        return dV

    def sampled(self, total: Tensor) -> Tensor:
        return total

    def _new_total(self, outputs: Tensor) -> Tensor:
        """Returns a tensor for the gradients of arranged inputs; zeros if some windows have no output."""
        new = outputs.new_empty if self.m >= self.windows else outputs.new_zeros
        if by_features(outputs):
            return new(self.windows, self.k, outputs.shape[1])
        return _side_by_side(new(outputs.shape[0], self.windows * self.k), self.k)

    @staticmethod
    def _write(buffer: Tensor, values: npt.NDArray[np.int64]) -> None:
        buffer.copy_(torch.from_numpy(values))


# The fastest way to gather features on the CPU, as measured (docs/operator.md): for 2-byte types, transposing,
# copying rows, and transposing back; for wider types, gathering along the features.


def by_features(x: Tensor) -> bool:
    """Returns whether arranged matrices of x's type and device have the tokens last."""
    return device_type(x) == "cpu" and x.dtype.itemsize == 2


def _gather(x: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns x[:, columns], in `out` or new."""
    # torch 2.13's index_select has a fast loop for this, on one thread. gather takes twice as long, but uses all.
    if torch.compiler.is_compiling() or device_type(x) != "cpu" or torch.get_num_threads() == 1:
        return torch.index_select(x, 1, columns, out=out)
    return torch.gather(x, 1, columns.long().expand(x.shape[0], -1), out=out)


def _side_by_side(matrix: Tensor, width: int) -> Tensor:
    """Returns (T, parts·width) as a view by part, (parts, T, width): parts are windows or runs."""
    return matrix.unflatten(1, (-1, width)).transpose(0, 1)


def _product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Writes a batch of products to `out`, which may be a view, or adds them to it."""
    if add:
        out.baddbmm_(left, right)
    elif torch.compiler.is_compiling():  # torch 2.13 cannot trace a product into a view
        out.copy_(torch.bmm(left, right))
    else:
        torch.bmm(left, right, out=out)
