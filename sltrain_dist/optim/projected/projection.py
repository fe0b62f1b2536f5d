"""Projections of a gradient G, (m, n), to a low rank r along its shorter side.

With m ≥ n, the projection P is (r, n), and the projected gradient is G·Pᵀ. Otherwise P is (m, r), and it is Pᵀ·G.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sltrain_dist.numerics.rounding import random_bits
from sltrain_dist.numerics.splitmix import key_bytes
from sltrain_dist.optim.projected.settings import projection_shape


def project(gradient: Tensor, projection: Tensor) -> Tensor:
    """Returns the projected gradient, (m, r) or (r, n)."""
    m, n = gradient.shape
    return gradient @ projection.T if m >= n else projection.T @ gradient


def project_back(low: Tensor, projection: Tensor, shape: torch.Size) -> Tensor:
    """Returns the (m, n) matrix of a projected one."""
    m, n = shape
    return low @ projection if m >= n else projection @ low


def principal_projection(gradient: Tensor, rank: int) -> Tensor:
    """Returns GaLore's projection: the first r singular vectors of the gradient on its shorter side, orthonormal.

    As the published code does, it computes the whole decomposition, in float32.
    """
    m, n = gradient.shape
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    return right[:rank] if m >= n else left[:, :rank]


def gaussian_projection(like: Tensor, rank: int, seed: int, name: str) -> Tensor:
    """Returns APOLLO's projection: values from N(0, 1/r), of the type and on the device of a gradient.

    The values are a function of (seed, name) and their position, so that they need not be stored. They are quantiles of
    the normal distribution at 2^23 evenly spaced probabilities.

    Args:
        like: The gradient.
        rank: r.
        seed: Keys the values, with `name`.
        name: Identifies the parameter and the number of the projection.
    """
    shape = projection_shape(tuple(like.shape), rank)
    key = int.from_bytes(key_bytes(seed, name)[:4], "big")
    odd = random_bits(key, 0, math.prod(shape), like.device).bitwise_right_shift_(9).mul_(2).add_(1)
    uniform = odd.to(torch.float32).mul_(2.0**-23).sub_(1)  # exact, and never ±1
    return uniform.erfinv_().mul_(math.sqrt(2 / rank)).view(shape).to(like.dtype)
