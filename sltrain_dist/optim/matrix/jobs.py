"""Computations with whole matrices of which ranks hold ranges, and who distributes them among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MatrixJob:
    """A computation that one rank makes with whole tensors, and whose results all ranks use.

    Attributes:
        shapes: Shapes of the tensors.
        outputs: How many of them, from the first on, are replaced by results.
        collect: Writes this rank's ranges of the tensors. Takes the tensors flat, in float32, filled with zeros.
        compute: Replaces the first `outputs` tensors by the results, in place. Takes the whole tensors in their shapes;
            called on one rank only.
        deliver: Uses the results, and may overwrite them. Takes the first `outputs` tensors, flat and whole; called on
            every rank.
    """

    shapes: tuple[tuple[int, ...], ...]
    outputs: int
    collect: Callable[[Sequence[Tensor]], None]
    compute: Callable[[Sequence[Tensor]], None]
    deliver: Callable[[Sequence[Tensor]], None]


Deal = Callable[[Sequence[MatrixJob]], None]
"""Makes jobs, which are the same in the same order on all ranks, so that each is computed by one of them."""


@dataclass(frozen=True)
class WholeMatrices:
    """What an optimizer needs to update matrices by all their values.

    Attributes:
        deal: Makes its jobs.
        low_rank_scale: s of the layers W = s·BA + S. It only matters to spectron.
    """

    deal: Deal
    low_rank_scale: float
