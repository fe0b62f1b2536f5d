"""Functions of a matrix's singular values: orthogonalization, and the spectral norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the polynomial that is applied to the singular values (Jordan, kellerjordan.github.io/posts/muon)."""
_ITERATIONS = 5
_EPS = 1e-7
"""Least norm that a matrix is divided by. As the coefficients, that of torch.optim.Muon."""

_SQUARINGS = 8


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a matrix with about the same singular vectors, whose singular values are about 1, or 0 where they were 0.

    Five Newton–Schulz iterations bring the singular values into about 0.7 … 1.2, which is enough for an optimizer. The
    operations are those of torch.optim.Muon, so that with bfloat16 the result is the same to the bit.

    Args:
        matrix: (m, n).
        dtype: Type of the matrix products.

    Returns:
        (m, n), of type `dtype`; it may be a transposed view.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if is_tall else x


def spectral_norm(matrix: Tensor) -> Tensor:
    """Returns the largest singular value of a matrix, too large by at most a factor of d^(1/512), d = min(m, n).

    For d = 128, that is 1%. With the Gram matrix G of the smaller side, whose largest eigenvalue is the square of the
    norm, it is computed as (tr G^256)^(1/512), by eight squarings of a d × d matrix. It depends on the values of the
    matrix alone, unlike a power iteration, whose vectors would have to be saved.

    Args:
        matrix: (m, n), of float32 or float64.

    Returns:
        A scalar of the same type; 0 for a matrix of zeros.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    trace = gram.diagonal().sum()
    log_eigenvalue = trace.log()
    for squaring in range(1, _SQUARINGS + 1):
        gram = gram / trace.clamp(min=tiny)  # so that no power overflows
        gram = gram @ gram
        trace = gram.diagonal().sum()
        log_eigenvalue = log_eigenvalue + trace.log() * 0.5**squaring
    return (log_eigenvalue / 2).exp()


def matched_scale(m: int, n: int) -> float:
    """Returns the factor that makes AdamW's learning rate suit an orthogonal (m, n) update: 0.2·√max(m, n).

    The values of such an update then have a root mean square of 0.2, which is typical of AdamW's.

    Source: arXiv 2502.16982, and torch.optim.Muon with adjust_lr_fn="match_rms_adamw".
    """
    return 0.2 * math.sqrt(max(m, n))
