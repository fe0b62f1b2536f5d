"""sparse_lowrank/balance.py: the same product, in balance, whatever its rank."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sltrain_dist.sparse_lowrank.balance import ABSENT_ROW_NORM, balanced

M, N, R = 40, 24, 6


def factors(seed: int = 0, m: int = M, n: int = N, r: int = R) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(shape, generator=generator) for shape in ((m, r), (r, n)))
    return 0.01 * B, 3.0 * A  # far from balanced


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("m", "n", "r"), [(M, N, R), (N, M, R), (R, R, R), (M, N, 1), (M, N, N), (1, 1, 1)])
@pytest.mark.parametrize("scale", [0.25, 1.0, 7.0])
def test_the_same_product_in_balance(m: int, n: int, r: int, scale: float) -> None:
    old_B, old_A = factors(1, m, n, r)
    B, A = balanced(old_B, old_A, scale)
    product = old_B.double() @ old_A.double()
    assert relative(B.double() @ A.double(), product) < 2e-6
    sigma = torch.linalg.svdvals(scale * product)[:r].float()
    largest = float(sigma[0])
    for gram in (B.T @ B, scale**2 * A @ A.T):
        torch.testing.assert_close(gram, torch.diag(sigma), rtol=1e-4, atol=1e-5 * largest)


def test_signs_and_order_do_not_depend_on_the_factors_given() -> None:
    """Other factors of the same product give the same result: U's largest entries are positive, Σ descends."""
    B, A = (factor.double() for factor in factors(2))
    mixing = torch.randn(R, R, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one, other = balanced(B, A, 0.5), balanced(-B @ mixing, -torch.linalg.inv(mixing) @ A, 0.5)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    columns = one[0].gather(0, one[0].abs().argmax(0, keepdim=True))[0]
    assert bool((columns > 0).all())
    norms = one[0].norm(dim=0)
    assert bool((norms[:-1] >= norms[1:]).all())
    again = balanced(B, A, 0.5)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, again, strict=True))
    twice = balanced(*one, 0.5)
    for mine, theirs in zip(one, twice, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_a_product_of_zero_stays_zero_and_can_be_learned() -> None:
    """B = 0 at the start: rows of A that were 0 too would have no gradient, neither would B."""
    _, A = factors(4)
    B, new = balanced(torch.zeros(M, R), A, 0.25)
    assert not B.any()
    torch.testing.assert_close(new @ new.T, ABSENT_ROW_NORM**2 * torch.eye(R), rtol=1e-5, atol=1e-6)
    # They span what A spanned.
    torch.testing.assert_close(A @ new.T @ new / ABSENT_ROW_NORM**2, A, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["zero columns", "equal columns", "zero rows"])
def test_missing_directions(case: str) -> None:
    old_B, old_A = factors(5)
    if case == "zero columns":
        old_B[:, [1, 4]] = 0
    elif case == "equal columns":
        old_B[:, 1], old_B[:, 4] = old_B[:, 0], 2 * old_B[:, 0]
    else:
        old_A[[1, 4]] = 0
    B, A = balanced(old_B, old_A, 0.5)
    assert relative(B @ A, old_B @ old_A) < 2e-6
    assert bool((B.norm(dim=0) > 0).tolist() == [True] * 4 + [False] * 2)
    assert A.norm(dim=1)[4:].tolist() == pytest.approx([ABSENT_ROW_NORM] * 2, rel=1e-5)
    gram = A @ A.T
    torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-5 * float(gram.max()))


def test_a_row_that_is_absent_is_as_long_as_one_at_the_start() -> None:
    rows = torch.empty(4, 100_000).uniform_(-1 / math.sqrt(100_000), 1 / math.sqrt(100_000))
    assert rows.norm(dim=1).tolist() == pytest.approx([ABSENT_ROW_NORM] * 4, rel=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite_stay_as_they_are(value: float) -> None:
    old_B, old_A = factors(6)
    old_A[2, 3] = value
    B, A = balanced(old_B, old_A, 0.5)
    assert torch.equal(B, old_B)
    assert A.nan_to_num().equal(old_A.nan_to_num())


def test_bf16_is_computed_in_float32() -> None:
    old_B, old_A = (factor.bfloat16() for factor in factors(7))
    B, A = balanced(old_B, old_A, 0.5)
    assert B.dtype == A.dtype == torch.float32
    assert relative(B @ A, old_B.float() @ old_A.float()) < 2e-6
