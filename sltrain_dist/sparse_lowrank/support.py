"""Supports: the fixed positions of the sparse part S, computed from (seed, layer name), never saved or sent.

A support is a module only so that its positions follow the layer to its device; it has no parameters, and
its buffers are not part of a checkpoint. What a checkpoint holds instead is the seed and a fingerprint.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sltrain_dist.numerics.keyed import integers, key64
from sltrain_dist.sparse_lowrank.layout import index_bytes_per_value, nonzeros


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
    dtype = np.int32 if index_bytes_per_value(m, n) == 4 else np.int64
    return np.flatnonzero(taken).astype(dtype)


class RandomSupport(nn.Module):
    """The paper's support: exactly int(δ·m·n) positions, uniform without replacement (arXiv 2406.02214).

    Args:
        m: Rows of W (out_features).
        n: Columns of W (in_features).
        density: δ.
        seed: Seed of the run.
        name: The layer's construction name, such as model.layers.0.self_attn.q_proj.
        device: Where the positions live. On "meta" they are computed by :meth:`reset`.

    Raises:
        ValueError: The density is outside (0, 1], or leaves no position.
    """

    positions: Tensor

    def __init__(
        self, m: int, n: int, density: float, *, seed: int = 0, name: str = "", device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ValueError(f"density = {density} is outside (0, 1]")
        self.m, self.n, self.seed, self.name = m, n, seed, name
        self.nnz = nonzeros(m, n, density)
        if self.nnz == 0:
            raise ValueError(f"density = {density} leaves no position in a {m}×{n} layer; raise it, or drop S")
        dtype = torch.int32 if index_bytes_per_value(m, n) == 4 else torch.int64
        device = torch.device(device or torch.get_default_device())
        self.register_buffer("positions", torch.empty(self.nnz, dtype=dtype, device=device), persistent=False)
        if device.type != "meta":
            self.reset()

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of V."""
        return (self.nnz,)

    def reset(self) -> None:
        """Computes the positions in place, on the device where the buffer is."""
        self.positions.copy_(torch.from_numpy(self._compute()))

    def indices(self) -> Tensor:
        """Flat positions i·n + c in the order of V.flatten(), int64."""
        return self.positions.long()

    def fingerprint(self) -> str:
        """16 hex digits over the shape and the positions that are in use on this device."""
        digest = hashlib.sha256(f"random:{self.m}:{self.n}:".encode())
        digest.update(self.positions.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def extra_repr(self) -> str:
        return f"random, nnz={self.nnz}"

    def _compute(self) -> npt.NDArray[np.signedinteger]:
        return random_positions(self.m, self.n, self.nnz, self.seed, self.name)
