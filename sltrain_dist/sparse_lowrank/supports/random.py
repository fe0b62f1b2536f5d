"""The support `random` of the paper: int(δ·m·n) positions chosen uniformly; stores their columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sltrain_dist.numerics.splitmix import integers
from sltrain_dist.sparse_lowrank.sizes import column_bytes, position_bytes
from sltrain_dist.sparse_lowrank.supports.support import Support


def random_positions(m: int, n: int, nnz: int, key: int) -> npt.NDArray[np.signedinteger]:
    """Draws `nnz` of the m·n flat positions, uniformly and without replacement.

    Positions are drawn from the stream of `key` one after another, and repeated ones ignored, until `nnz` are distinct;
    by symmetry, every set is equally likely. Above a density of one half, the positions that are left out are drawn
    instead.

    Returns:
        Sorted positions i·n + c; int32, or int64 where m·n ≥ 2^31.
    """
    size = m * n
    draw = min(nnz, size - nnz)
    taken = np.zeros(size, dtype=np.bool_)
    counter, distinct = 0, 0
    while distinct < draw:  # each round draws as many as are missing, so it never takes too many
        taken[integers(key, counter, draw - distinct, size)] = True
        counter += draw - distinct
        distinct = int(np.count_nonzero(taken))
    if draw < nnz:
        np.logical_not(taken, out=taken)
    dtype = np.int32 if position_bytes(m, n) == 4 else np.int64
    return np.flatnonzero(taken).astype(dtype)


class RandomSupport(Support):
    """The paper's support: exactly int(δ·m·n) positions, uniform without replacement (arXiv 2406.02214).

    The buffers hold the columns and each row's number of values, half the bytes of flat positions. The positions are
    computed from them when used, in an eighth of the time that adding values at them takes (docs/operator.md).

    Args: as of :class:`Support`, and
        device: Device of the columns. On "meta", they are computed when memory is allocated (`to_empty`).

    Attributes:
        columns: (nnz,) in the order of the positions, int16 (int32 where n > 2^15).
        row_counts: (m,) int32, the number of values in every row.
    """

    kind = "random"
    columns: Tensor
    row_counts: Tensor

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
        # Number of values before each row, on the host; until the positions exist, the expected numbers.
        self._before_row: list[int] = [self.nnz * i // m for i in range(m + 1)]
        dtype = torch.int16 if column_bytes(n) == 2 else torch.int32
        self._make_buffers(device, {"columns": (self.nnz, dtype), "row_counts": (m, torch.int32)})

    def _compute(self, key: int, shift: int) -> None:
        positions = random_positions(self.m, self.n, self.nnz, key)
        before_row = np.searchsorted(positions, np.arange(self.m + 1, dtype=np.int64) * self.n)
        self._before_row = before_row.tolist()
        self.columns.copy_(torch.from_numpy(positions % self.n))
        self.row_counts.copy_(torch.from_numpy(np.diff(before_row)))

    def row_positions(self, first: int, last: int) -> Tensor:
        dtype = torch.int32 if position_bytes(self.m, self.n) == 4 else torch.int64
        starts = torch.arange(last - first, dtype=dtype, device=self.columns.device).mul_(self.n)
        return self._repeat_by_row(starts, first, last).add_(self.columns[self.row_values(first, last)])

    def row_values(self, first: int, last: int) -> slice:
        return slice(self._before_row[first], self._before_row[last])

    def _repeat_by_row(self, numbers: Tensor, first: int, last: int) -> Tensor:
        """Repeats the number of each row for all of the row's values."""
        values = self.row_values(first, last)
        return numbers.repeat_interleave(self.row_counts[first:last], output_size=values.stop - values.start)

    def _rows_and_columns(self) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self.m, dtype=torch.int32, device=self.columns.device)
        return self._repeat_by_row(rows, 0, self.m), self.columns.int()
