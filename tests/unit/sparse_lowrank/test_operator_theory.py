"""Ranks and conversions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.sparse_lowrank import SLLinear
from sltrain_dist.sparse_lowrank.convert import fit
from sltrain_dist.sparse_lowrank.layer import SUPPORTS

KINDS: tuple[SupportKind, ...] = ("random", "stratified", "blocks")
each_kind = pytest.mark.parametrize("kind", KINDS)


def sparse_part(kind: SupportKind, m: int, n: int, density: float, seed: int) -> torch.Tensor:
    support = SUPPORTS[kind](m, n, density, seed=seed, name="x")
    values = torch.randn(support.nnz, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.zeros(m * n, dtype=torch.float64).index_put((support.indices(),), values).view(m, n)


@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_proposition_1(kind: SupportKind) -> None:
    """At δ = log n / n, BA + S has full rank with high probability, whatever the rank of BA (the paper's section 3).

    The claim is for large n: with r empty rows or columns to spare, BA + S lacks rank with vanishing
    probability. Without BA, S alone of `random` lacks it in most draws: rows and columns stay empty.
    """
    n, r, draws = 200, 8, 20
    deficient = alone = 0
    for seed in range(draws):
        S = sparse_part(kind, n, n, math.log(n) / n, seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        B, A = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, r), (r, n)))
        deficient += int(torch.linalg.matrix_rank(B @ A + S)) < n
        alone += int(torch.linalg.matrix_rank(S)) < n
    assert deficient == 0
    if kind == "random":
        assert alone > draws / 4


@pytest.mark.parametrize(("m", "n", "density"), [(60, 60, 0.1), (40, 75, 0.05), (75, 40, 0.2), (31, 300, 0.03)])
def test_blocks_have_the_rank_of_their_maximum_matching(m: int, n: int, density: float) -> None:
    """The largest rank that any values at these positions can have, and random ones do."""
    S = sparse_part("blocks", m, n, density, 3)
    matching = maximum_bipartite_matching(csr_matrix((S != 0).numpy()), perm_type="column")
    matched = int((matching >= 0).sum())
    assert int(torch.linalg.matrix_rank(S)) == matched
    if m == n:
        assert matched > 0.9 * n


@each_kind
def test_merged_layer_computes_the_same(kind: SupportKind) -> None:
    layer = SLLinear(37, 23, 5, 0.1, 2.0, support=kind, bias=True, name="a.b", seed=0, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
        layer.bias.normal_()
    x = torch.randn(4, 37, dtype=torch.float64)
    merged = layer.merge_to_linear()
    torch.testing.assert_close(merged(x), layer(x))
    assert merged.weight.requires_grad
    assert not merged.weight.is_meta


@each_kind
def test_from_dense_recovers_what_is_sparse_plus_low_rank(kind: SupportKind) -> None:
    m, n, r = 40, 50, 3
    layer = SLLinear(n, m, r, 0.04, 6.0, support=kind, name="a.b", seed=3, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_(generator=torch.Generator().manual_seed(0))
    weight = layer.dense_weight()
    errors = []
    for sweeps in (1, 2, 40):
        back = SLLinear.from_dense(weight, r, 0.04, 6.0, support=kind, name="a.b", seed=3, sweeps=sweeps)
        errors.append(float((back.dense_weight() - weight).norm() / weight.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 5e-3
    assert back.support.fingerprint() == layer.support.fingerprint()


@each_kind
def test_from_dense_is_better_than_either_part_alone(kind: SupportKind) -> None:
    weight = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(60)
    layer = SLLinear.from_dense(weight, 10, 0.1, 3.0, support=kind, bias=bias, seed=0)
    low_rank = float(torch.linalg.svdvals(weight)[10:].norm())
    error = float((layer.dense_weight() - weight).norm())
    assert error < 0.97 * low_rank
    assert torch.equal(layer.bias, bias)
    assert layer.V.dtype == torch.float32


def test_fit_refuses_other_shapes() -> None:
    support = SUPPORTS["random"](6, 7, 0.2)
    with pytest.raises(ValueError, match="support is for"):
        fit(torch.zeros(7, 6), 2, 1.0, support)
    with pytest.raises(ValueError, match="sweeps"):
        fit(torch.zeros(6, 7), 2, 1.0, support, sweeps=0)
