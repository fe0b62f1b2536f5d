"""The balanced factorization of a low-rank product, for restarts (arXiv 2505.22922)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ABSENT_ROW_NORM = 1 / math.sqrt(3)
"""Norm of the rows of A whose column of B is 0. It is the root mean square norm of a row of the initial A, whose values
are from U(±1/√n)."""


@torch.no_grad()
def balanced(B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns factors of the same product scale·BA that share its singular values evenly: BᵀB = scale²·AAᵀ = Σ.

    With the singular value decomposition scale·BA = UΣVᵀ, the new factors are B = U√Σ and A = √ΣVᵀ/scale. W is never
    formed: B and Aᵀ are decomposed by QR, and an SVD is computed of the r × r core between them. Columns are in the
    order of the singular values, the largest first. Of the two possible signs of a singular pair, the one is chosen for
    which the entry of largest magnitude in the column of U is positive.

    Singular values of at most r times the rounding error of the largest one count as 0: BA has fewer than r directions.
    The columns of B that are left over become 0, which keeps the product, and their rows of A become orthogonal to all
    others, of norm :data:`ABSENT_ROW_NORM`. With a row of 0, they could never learn again: the gradient of a column of
    B is proportional to its row of A, and the other way round. In particular B = 0, the initial value, stays 0.

    Args:
        B: (m, r), r ≤ min(m, n).
        A: (r, n).
        scale: s; positive.

    Returns:
        B (m, r) and A (r, n), new tensors in float32, or in float64 for factors of float64. Factors that are not
        finite have no decomposition and are returned as they are; the loss of such a model is not finite either.

    Source: arXiv 2505.22922, weight refactorization, there without a scale.
    """
    dtype = torch.promote_types(B.dtype, torch.float32)
    B, A = B.to(dtype), A.to(dtype)
    if not bool(torch.isfinite(B).all() & torch.isfinite(A).all()):
        return B.clone(), A.clone()
    Q_left, R_left = torch.linalg.qr(B)
    Q_right, R_right = torch.linalg.qr(A.T)
    U, sigma, Vh = torch.linalg.svd(R_left @ R_right.T * scale)
    is_present = sigma > len(sigma) * torch.finfo(dtype).eps * sigma[0]
    roots = sigma.sqrt()
    left = Q_left @ U
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0).to(dtype)
    rows = torch.where(is_present, roots / scale, ABSENT_ROW_NORM)
    right = Vh.mul_((signs * rows)[:, None]) @ Q_right.T
    return left.mul_(signs * torch.where(is_present, roots, 0.0)), right
