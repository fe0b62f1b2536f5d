"""Conversion of a dense weight to B, A and V: the best low-rank part, and the residual at the support."""

from __future__ import annotations

import torch
from torch import Tensor

from sltrain_dist.sparse_lowrank.supports.support import Support


@torch.no_grad()
def low_rank(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Returns B (m, r) and A (r, n), so that scale·BA is the best rank-r approximation of `weight` (m, n).

    They come from the truncated singular value decomposition UΣVᵀ, half of Σ in each: B = U√(Σ/s), A = √(Σ/s)Vᵀ.
    """
    U, sigma, Vh = torch.linalg.svd(weight, False)
    roots = (sigma[:rank] / scale).sqrt()
    return U[:, :rank] * roots, roots[:, None] * Vh[:rank]


@torch.no_grad()
def fit(weight: Tensor, rank: int, scale: float, support: Support, sweeps: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Approximates `weight` by scale·BA + S.

    Every sweep sets BA to the best rank-r approximation of W − S (a truncated singular value decomposition), and then V
    to W − scale·BA at the support. Each of these is optimal in the Frobenius norm given the other, so that the error
    never grows from sweep to sweep.

    Args:
        weight: W, (m, n).
        rank: r.
        scale: s.
        support: Support of the (m, n) layer, on the weight's device.
        sweeps: At least 1.

    Returns:
        B (m, r), A (r, n) and V, in float32, or in float64 for a float64 weight.

    Raises:
        ValueError: The weight and the support differ in shape, or `sweeps` is not positive.
    """
    if tuple(weight.shape) != (support.m, support.n):
        raise ValueError(f"the weight is {tuple(weight.shape)}, but the support is for ({support.m}, {support.n})")
    if sweeps < 1:
        raise ValueError(f"sweeps = {sweeps} must be at least 1")
    W = weight if weight.dtype == torch.float64 else weight.float()
    positions = support.indices()
    values = torch.zeros(support.nnz, dtype=W.dtype, device=W.device)
    for _ in range(sweeps):
        B, A = low_rank(W.flatten().index_add(0, positions, values, alpha=-1).view_as(W), rank, scale)
        values = (W - scale * (B @ A)).flatten().index_select(0, positions)
    return B, A, values.view(support.values_shape)
