"""optim/matrix/spectrum.py: singular values before and after, and torch's own orthogonalization."""

from __future__ import annotations

import pytest
import torch
from torch.optim import _muon as torch_muon

from sltrain_dist.optim.matrix.spectrum import orthogonalize, spectral_norm

SHAPES = [(40, 12), (12, 40), (24, 24), (1, 9), (9, 1)]


def random_matrix(m: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, dtype=dtype, generator=torch.Generator().manual_seed(m * 100 + n))


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_gives_the_bits_of_torch(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    coefficients = torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C
    expected = torch_muon._zeropower_via_newtonschulz(matrix, coefficients, torch_muon.DEFAULT_NS_STEPS, torch_muon.EPS)
    assert torch.equal(orthogonalize(matrix, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_about_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    found = torch.linalg.svdvals(orthogonalize(random_matrix(*shape), dtype).float())
    assert 0.65 < float(found.min()) <= float(found.max()) < 1.25


def test_singular_vectors_stay() -> None:
    """O(M)ᵀM is symmetric, as (UVᵀ)ᵀUΣVᵀ = VΣVᵀ is."""
    matrix = random_matrix(40, 12, torch.float64)
    product = orthogonalize(matrix, torch.float64).T @ matrix
    torch.testing.assert_close(product, product.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_norm(shape: tuple[int, int], scale: float) -> None:
    matrix = random_matrix(*shape) * scale
    found, exact = float(spectral_norm(matrix)), float(torch.linalg.matrix_norm(matrix, 2))
    assert exact * (1 - 1e-5) <= found <= exact * min(shape) ** (1 / 512) * (1 + 1e-5)


def test_the_largest_error_is_that_of_equal_singular_values() -> None:
    assert float(spectral_norm(torch.eye(128))) == pytest.approx(128 ** (1 / 512), rel=1e-5)


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(8, 3)
    assert float(spectral_norm(zeros)) == 0
    assert torch.equal(orthogonalize(zeros, torch.float32), zeros)
