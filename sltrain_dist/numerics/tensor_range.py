"""A range of a flattened tensor (no torch): what a rank holds of a parameter, and what a checkpoint stores."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorRange:
    """A contiguous range of a named, flattened tensor.

    Attributes:
        name: Name of the tensor.
        shape: Shape of the whole tensor.
        start: Position of the first value.
        count: Number of values. Ranges of matrices that ranks hold are whole rows.
        borders: Positions where the other ranks' ranges begin. Only for vectors, whose quantization groups they divide.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    borders: tuple[int, ...] = ()

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> TensorRange:
        """Returns the range of all values of a tensor."""
        return cls(name, shape, 0, math.prod(shape))

    @property
    def row(self) -> int:
        """Number of values in a row; a vector is one row."""
        return self.shape[-1]

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor has two or more dimensions."""
        return len(self.shape) > 1

    @property
    def stop(self) -> int:
        """Position after the last value."""
        return self.start + self.count
