"""The supports: their definition, their statistics, and that they never change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import SupportKind
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.models.count import count_parameters
from sltrain_dist.numerics.splitmix import key64, permutation
from sltrain_dist.sparse_lowrank import SLLinear
from sltrain_dist.sparse_lowrank.layer import SUPPORTS
from sltrain_dist.sparse_lowrank.sizes import (
    effective_density,
    nonzeros,
    num_windows,
    stored_index_bytes,
    values_per_row,
    window_starts,
)
from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport, first_window
from sltrain_dist.sparse_lowrank.supports.stratified import (
    StratifiedSupport,
    murmur_finalise,
    stratified_column,
    stratified_key,
)

KINDS: tuple[SupportKind, ...] = ("random", "stratified", "blocks")
NAME = "model.layers.0.self_attn.q_proj"

SIZES = {
    "square": (64, 48, 0.1),
    "primes": (13, 67, 0.2),
    "one value a row": (9, 31, 0.03),
    "all of a row": (5, 12, 1.0),
    "fewer rows than windows": (3, 100, 0.02),
    "one row": (1, 17, 0.3),
    "one column": (17, 1, 1.0),
    "two overlapping windows": (10, 13, 0.7),
    "rounded to eight": (20, 300, 0.03),
    "1B's MLP": (60, 5461, 0.03),
}


@pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_distinct_and_as_many_as_promised(kind: SupportKind, size: tuple[int, int, float]) -> None:
    m, n, density = size
    support = SUPPORTS[kind](m, n, density, seed=3, name=NAME)
    positions = support.indices()
    assert positions.dtype == torch.int64
    assert positions.shape == (support.nnz,)
    assert len(positions.unique()) == support.nnz == nonzeros(m, n, density, kind) == np.prod(support.values_shape)
    assert 0 <= int(positions.min()) <= int(positions.max()) < m * n
    assert effective_density(m, n, density, kind) == support.nnz / (m * n)
    if kind != "random":
        k = values_per_row(n, density, kind)
        assert support.values_shape == (m, k)
        assert torch.equal(positions.view(m, k) // n, torch.arange(m)[:, None].expand(m, k))


@pytest.mark.parametrize("kind", KINDS)
def test_row_blocks_put_together_are_the_whole(kind: SupportKind) -> None:
    m, n = 23, 37
    support = SUPPORTS[kind](m, n, 0.1, seed=1, name=NAME)
    bounds = [0, 1, 8, 8, 20, 23]
    pieces = []
    for first, last in itertools.pairwise(bounds):
        part = support.row_values(first, last)
        piece = support.row_positions(first, last).long() + first * n
        assert len(piece) == part.stop - part.start
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), support.indices())


@pytest.mark.parametrize("kind", KINDS)
def test_depends_on_seed_and_name(kind: SupportKind) -> None:
    def fingerprint(seed: int, name: str) -> str:
        return SUPPORTS[kind](40, 50, 0.1, seed=seed, name=name).fingerprint()

    names = [NAME, NAME.replace("q_", "k_"), NAME.replace(".0.", ".1."), ""]
    prints = {fingerprint(seed, name) for seed in (0, 1) for name in names}
    assert len(prints) == 2 * len(names)
    assert fingerprint(0, NAME) == fingerprint(0, NAME)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_on_the_meta_device_gets_its_support_later(kind: SupportKind) -> None:
    with torch.device("meta"):
        layer = SLLinear(30, 20, 4, 0.1, 1.0, support=kind, name=NAME, seed=2)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.support.fingerprint() == SUPPORTS[kind](20, 30, 0.1, seed=2, name=NAME).fingerprint()
    assert layer.V.shape == layer.support.values_shape


def test_known_answers() -> None:
    """Positions are part of the checkpoint format: they must never change."""
    assert [murmur_finalise(h) for h in (0, 1, 0xDEADBEEF)] == [0, 0x514E28B7, 0x0DE5C6A9]
    stratified = StratifiedSupport(4, 7, 3 / 7, seed=0, name=NAME)
    assert stratified.columns(0, 4).tolist() == [[0, 3, 5], [1, 3, 6], [0, 2, 4], [0, 2, 4]]
    assert stratified.fingerprint() == "c0ed3d961bb107e1"
    blocks = BlockSupport(6, 7, 2 / 7, seed=0, name=NAME)
    assert blocks.columns(0, 6).tolist() == [[0, 3], [0, 3], [5, 1], [5, 1], [4, 2], [2, 6]]
    assert blocks.fingerprint() == "24545ae7afff6e69"


@pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))
def test_stratified_equals_its_definition_in_python_integers(size: tuple[int, int, float]) -> None:
    m, n, density = size
    support = StratifiedSupport(m, n, density, seed=7, name="x")
    key, k = stratified_key(7, "x"), support.k
    want = [[stratified_column(key, i, j, n, k) for j in range(k)] for i in range(m)]
    assert support.columns(0, m).tolist() == want
    for row in want:
        assert all(j * n // k <= c < (j + 1) * n // k for j, c in enumerate(row))


def test_stratified_multiplies_without_overflow_at_the_last_row_and_slot() -> None:
    """Large row numbers reach the sign bit of 32 bits; the reference is exact."""
    support = StratifiedSupport(1 << 17, 64, 0.1, seed=7, name="x")
    first = (1 << 17) - 3
    want = [
        [stratified_column(int(support.key), i, j, 64, support.k) for j in range(support.k)]
        for i in range(first, 1 << 17)
    ]
    assert support.columns(first, 1 << 17).tolist() == want


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Standard deviations that a χ² statistic lies above its mean."""
    degrees = counts.numel() - 1
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    return (chi2 - degrees) / (2 * degrees) ** 0.5


def test_stratified_is_uniform_and_its_slots_and_rows_are_independent() -> None:
    m, n = 20_000, 64
    support = StratifiedSupport(m, n, 0.125, seed=0, name=NAME)  # 8 strata of 8 columns
    columns = support.columns(0, m)
    counts = torch.bincount(columns.flatten(), minlength=n).double()
    assert abs(chi_squared(counts, torch.full((n,), m * 8 / n, dtype=torch.float64))) < 5
    inside = columns % 8
    for other in (inside.roll(1, 0), inside.roll(1, 1)):  # the row before, the slot before
        pairs = torch.bincount((inside * 8 + other).flatten(), minlength=64).double()
        assert abs(chi_squared(pairs, torch.full((64,), m * 8 / 64, dtype=torch.float64))) < 5
    # Two layers agree by chance alone.
    twin = StratifiedSupport(m, n, 0.125, seed=0, name=NAME.replace("q_", "k_")).columns(0, m)
    assert float((twin == columns).double().mean()) == pytest.approx(1 / 8, abs=5 * (7 / 64 / (m * 8)) ** 0.5)


@pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))
def test_blocks_are_dense_between_permuted_inputs_and_runs_of_outputs(size: tuple[int, int, float]) -> None:
    m, n, density = size
    support = BlockSupport(m, n, density, seed=5, name=NAME)
    k, w = support.k, num_windows(n, support.k)
    starts = window_starts(n, k)
    assert starts[0] == 0
    assert starts[-1] + k == n
    assert all(0 <= b - a <= k for a, b in itertools.pairwise(starts))
    uses = torch.zeros(n, dtype=torch.int64)
    for start in starts:
        uses[start : start + k] += 1
    assert set(uses.tolist()) <= {1, 2}
    inputs = torch.from_numpy(permutation(key64(5, f"{NAME.rpartition('.')[0]}.inputs"), n))
    shift = key64(0, "q_proj.start") * w >> 64
    assert torch.equal(support.window_inputs[support.input_places], torch.arange(n, dtype=torch.int32))
    columns = support.columns(0, m)
    longer = m % w
    runs = [j for j in range(w) for _ in range(m // w + (j < longer))]
    assert len(runs) == m
    for output, run in enumerate(runs):
        window = (run + shift) % w
        assert torch.equal(columns[output].long(), inputs[starts[window] : starts[window] + k])
    if m >= w:
        assert len(columns.unique()) == n


def test_blocks_round_to_eight_where_wide() -> None:
    assert [values_per_row(n, 0.03, "blocks") for n in (255, 256, 768, 2048, 5461)] == [8, 8, 24, 64, 160]
    assert [values_per_row(n, 0.03, "stratified") for n in (10, 255, 2048, 5461)] == [1, 8, 61, 164]
    assert values_per_row(260, 1.0, "blocks") == 260
    assert values_per_row(300, 1e-4, "blocks") == 8


def test_layers_of_one_module_permute_their_inputs_alike() -> None:
    q, k, other = (
        BlockSupport(50, 60, 0.1, seed=0, name=f"model.layers.{x}")
        for x in ("0.attn.q_proj", "0.attn.k_proj", "1.attn.q_proj")
    )
    assert torch.equal(q.window_inputs, k.window_inputs)
    assert not torch.equal(q.window_inputs, other.window_inputs)
    # The same outputs have other windows in each, and those of one name the same everywhere, for compilation.
    assert q.shift == other.shift
    for windows in (8, 13, 33, 42):
        for module in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert len({first_window(f"x.{name}", windows) for name in module}) == len(module)


def test_blocks_permutations_are_uniform() -> None:
    size, draws = 6, 3000
    counts = torch.zeros(size, size, dtype=torch.float64)
    for seed in range(draws):
        counts[torch.arange(size), torch.from_numpy(permutation(key64(seed, "x"), size))] += 1
    # (size − 1)² degrees of freedom, as rows and columns are fixed.
    chi2 = float(((counts - draws / size) ** 2 / (draws / size)).sum())
    assert abs(chi2 - 25) < 5 * 50**0.5


def test_permutations_have_every_input_once() -> None:
    for size in (1, 7, 8, 9, 100):
        assert sorted(permutation(5, size)) == list(range(size))


@pytest.mark.parametrize("kind", KINDS)
def test_counted_parameters_are_those_of_the_model(kind: SupportKind) -> None:
    config = build_config({"preset": "llama_60m", "reparam": {"support": kind}})
    built = sum(p.numel() for p in build_meta_model(config).parameters())
    assert count_parameters(config.model, config.reparam).total == built


def test_stored_index_bytes() -> None:
    for kind in KINDS:
        support = SUPPORTS[kind](200, 300, 0.05)
        # A stratified support keeps its key, one number a layer, and no index.
        stored = sum(b.nbytes for name, b in support.named_buffers() if name != "key")
        assert stored == stored_index_bytes(200, 300, 0.05, kind)
    assert stored_index_bytes(2048, 2048, 0.03, "stratified") == 0
