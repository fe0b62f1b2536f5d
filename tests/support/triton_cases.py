"""What holds of the Triton kernels, in Triton's interpreter (tests/unit) as on a GPU (tests/gpu).

Run on the CPU with TRITON_INTERPRET=1, which must be set before Triton is imported; so not collected by itself.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from sltrain_dist.numerics import gpu_kernels
from sltrain_dist.sparse_lowrank import SLLinear
from sltrain_dist.sparse_lowrank.kernels import torch_kernels as kernels
from sltrain_dist.sparse_lowrank.layer import apply_shared
from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport
from sltrain_dist.sparse_lowrank.supports.stratified import StratifiedSupport, stratified_column
from sltrain_dist.sparse_lowrank.supports.support import Products

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Relative errors, ‖out − ref‖ / ‖ref‖; the interpreter truncates what it casts to bf16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# (m, n, density, tokens): windows that overlap, uneven and empty windows, one window, rank-one sums, primes.
SHAPES = [(37, 53, 0.1, 19), (3, 37, 0.05, 3), (24, 20, 1.0, 33), (7, 7, 0.01, 1), (70, 83, 0.8, 17)]
# Several tiles, chunks of tokens and steps of every sum; too slow to interpret in number.
LARGE = [(70, 83, 0.8, 515)] if INTERPRETED else [(1365, 2048, 0.03, 1100), (5461, 2048, 0.03, 8192)]
# To the interpreter, float16 is like float32.
CASES = [
    (shape, dtype)
    for shape in SHAPES
    for dtype in TOLERANCE
    if not INTERPRETED or dtype != torch.float16 or shape == SHAPES[0]
]

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "DEVICES", [DEVICE])


def made(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw.to(DEVICE, dtype)


def error(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape and bool(out.isfinite().all())
    out, expected = out.detach(), expected.detach()
    return float((out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def block_products(support: BlockSupport, V: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    products = support.products(x)
    assert isinstance(products, kernels.BlockProducts)
    assert products.step(x) >= len(x)
    return every_product(products, V, x, g)


def every_product(products: Products, V: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs, outputs = products.arrange_inputs(x), products.arrange_outputs(g)
    y = products.multiply(products.weights(V), inputs)
    dx = products.restore_inputs(products.multiply_transposed(products.transposed_weights(V), outputs))
    return y, dx, products.sampled(products.sample(products.places(), outputs, inputs))


def check_blocks(shape: tuple[int, int, float, int], dtype: torch.dtype) -> None:
    m, n, density, tokens = shape
    support = BlockSupport(m, n, density, name="a.q", seed=0, device=DEVICE)
    x, g = made(tokens, n, dtype=dtype, seed=0), made(tokens, m, dtype=dtype, seed=1)
    V = made(m, support.k, dtype=dtype, seed=2)
    results = block_products(support, V, x, g)
    # The definition, in float64, from the positions alone.
    S = torch.zeros(m * n, dtype=torch.float64, device=DEVICE).index_put((support.indices(),), V.double().flatten())
    S = S.view(m, n)
    G = (g.double().t() @ x.double()).flatten()[support.indices()].view(m, support.k)
    for out, expected in zip(results, (x.double() @ S.t(), g.double() @ S, G), strict=True):
        assert error(out, expected) < TOLERANCE[dtype]
    # torch's implementation, in the same type.
    for out, other in zip(results, every_product(support, V, x, g), strict=True):
        assert error(out, other) < 2 * TOLERANCE[dtype]
    for products in (support.products(x), support):
        total = products.sum_over_tokens(g, products.arrange_inputs(x))
        assert error(total, g.double().t() @ x.double()) < 2 * TOLERANCE[dtype]
    # No sum depends on the order in which programs happen to run.
    assert all(torch.equal(a, b) for a, b in zip(results, block_products(support, V, x, g), strict=True))


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_products_of_blocks(shape: tuple[int, int, float, int], dtype: torch.dtype) -> None:
    check_blocks(shape, dtype)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_products_of_blocks_over_many_tiles(shape: tuple[int, int, float, int]) -> None:
    for dtype in [torch.float32] if INTERPRETED else TOLERANCE:
        check_blocks(shape, dtype)


@each_dtype
def test_transposing_pads_with_zeros_and_back(dtype: torch.dtype) -> None:
    x = made(67, 71, dtype=dtype, seed=0)
    x_t = kernels.transpose(x)
    assert x_t.shape == (71, 80) and torch.equal(x_t[:, :67], x.t()) and not x_t[:, 67:].any()
    assert torch.equal(kernels.transpose_back(x_t, 67, None, 1), x)


def test_a_total_is_added_to() -> None:
    support = BlockSupport(37, 53, 0.1, name="a.q", seed=0, device=DEVICE)
    V, g = made(37, support.k, dtype=torch.float32, seed=0), made(19, 37, dtype=torch.float32, seed=1)
    products = support.products(g)
    outputs = products.arrange_outputs(g)
    weights = products.transposed_weights(V)
    once = products.multiply_transposed(weights, outputs)
    twice = products.multiply_transposed(weights, outputs, once)
    torch.testing.assert_close(twice, 2 * once)


def test_a_gradient_that_is_not_finite_stays_in_its_window() -> None:
    """Padding, and outputs of the next run, must be masked, not multiplied by zero."""
    m, n = 3, 37  # 19 windows, of which 16 have no output
    support = BlockSupport(m, n, 0.05, name="a.q", seed=0, device=DEVICE)
    g = torch.full((3, m), float("inf"), device=DEVICE)
    V = torch.ones(m, support.k, device=DEVICE)
    _, dx, _ = block_products(support, V, torch.ones(3, n, device=DEVICE), g)
    used = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    used[support.indices() % n] = True
    assert bool((dx[:, ~used] == 0).all()) and bool((dx[:, used] == float("inf")).all())


@each_dtype
@pytest.mark.parametrize("shape", [(13, 101, 0.07), (3, 7, 0.01), (9, 64, 1.0)], ids=str)
def test_scatter_and_gather_of_stratified(shape: tuple[int, int, float], dtype: torch.dtype) -> None:
    m, n, density = shape
    support = StratifiedSupport(m, n, density, seed=1, name="zz", device=DEVICE)  # its key is above 2^31
    assert support.key >= 1 << 31
    V = made(m, support.k, dtype=dtype, seed=0)
    for first in (0, 2):
        W = made(m - first, n, dtype=dtype, seed=1)
        expected = W.double().flatten().index_add_(0, support.row_positions(first, m), V[first:].double().flatten())
        support.add_to_rows_(W, V, first, m)
        if INTERPRETED and dtype == torch.bfloat16:
            assert error(W.flatten(), expected) < TOLERANCE[dtype]
        else:
            assert torch.equal(W.flatten(), expected.to(dtype))
        taken = support.take_from_rows(W, first, m)
        assert torch.equal(taken, W.flatten()[support.row_positions(first, m)])


def as_key(key: int) -> torch.Tensor:
    return torch.tensor([key], device=DEVICE)


@pytest.mark.parametrize(("key", "n", "k"), [(0, 1000, 30), (0xFFFFFFFF, 11008, 330), (0x12345678, 97, 97)])
def test_the_hash_is_that_of_python(key: int, n: int, k: int) -> None:
    rows = 7
    positions = torch.arange(rows * n, dtype=torch.float32, device=DEVICE).view(rows, n)
    for first in (0, 123456789):
        columns = (kernels.stratified_take(positions, k, as_key(key), first) - positions[:, :1]).long().tolist()
        assert columns == [[stratified_column(key, first + i, j, n, k) for j in range(k)] for i in range(rows)]


def test_known_answers_of_the_hash() -> None:
    row = torch.arange(1000, dtype=torch.float32, device=DEVICE)[None]
    assert kernels.stratified_take(row, 10, as_key(0), 0).long().tolist() == KNOWN[0]
    assert kernels.stratified_take(row, 10, as_key(0xDEADBEEF), 4095).long().tolist() == KNOWN[1]


KNOWN = [
    [[0, 121, 290, 360, 400, 595, 669, 775, 847, 934]],
    [[90, 123, 204, 328, 470, 511, 636, 775, 804, 952]],
]


@pytest.mark.parametrize("support", ["stratified", "blocks"])
@pytest.mark.parametrize("path", ["materialize", "factored"])
def test_layers_use_the_kernels_and_agree(support: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share their input, forward and backward, against float64, which torch's implementation computes."""

    def run(dtype: torch.dtype) -> list[Tensor]:
        layers = [
            SLLinear(
                53, m, 4, 0.1, 6, support=support, path=path, row_block_bytes=53 * 4 * 10,
                name=f"a.{m}", seed=0, device=DEVICE, dtype=dtype,
            )
            for m in (37, 22)
        ]  # fmt: skip
        for layer in layers:
            layer.B.data = made(*layer.B.shape, dtype=dtype, seed=4)
        x = made(19, 53, dtype=dtype, seed=5).requires_grad_()
        outputs = apply_shared(layers, x)
        torch.autograd.backward(outputs, [made(*y.shape, dtype=dtype, seed=6) for y in outputs])
        return [*outputs, x.grad, *(p.grad for layer in layers for p in layer.parameters())]

    calls = []
    for name in ("stratified_add_", "stratified_take", "blocks_outputs", "blocks_inputs", "blocks_values"):
        for module in (kernels, __import__("sltrain_dist.sparse_lowrank.supports.stratified", fromlist=["x"])):
            if hasattr(module, name):
                original = getattr(module, name)
                monkeypatch.setattr(module, name, lambda *a, o=original, n=name: calls.append(n) or o(*a))
    single = run(torch.float32)
    if support == "blocks" and path == "factored":
        assert set(calls) == {"blocks_outputs", "blocks_inputs", "blocks_values"}
    if support == "stratified" and path == "materialize":
        assert {"stratified_add_"} <= set(calls)
    calls.clear()
    for out, expected in zip(single, run(torch.float64), strict=True):
        assert error(out, expected) < 1e-5
    assert not calls  # float64 is torch's


def test_compiles_without_graph_breaks() -> None:
    layer = SLLinear(53, 37, 4, 0.1, 6, support="blocks", path="factored", name="a.q", seed=0, device=DEVICE)
    x = made(19, 53, dtype=torch.float32, seed=5).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    results = []
    for f in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        y = f(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.V.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "case",
    [
        lambda s, x, g, V: torch.library.opcheck(kernels.transpose, (x,)),
        lambda s, x, g, V: torch.library.opcheck(
            kernels.transpose_back, (kernels.transpose(g), 19, None, s.k)
        ),
        lambda s, x, g, V: torch.library.opcheck(
            kernels.blocks_outputs, (kernels.transpose(x), V, s.window_inputs, s.shift)
        ),
        lambda s, x, g, V: torch.library.opcheck(
            kernels.blocks_inputs, (kernels.transpose(g), V, s.windows, s.shift, None)
        ),
        lambda s, x, g, V: torch.library.opcheck(
            kernels.blocks_values, (kernels.transpose(g), kernels.transpose(x), s.window_inputs, s.shift, s.k)
        ),
        lambda s, x, g, V: torch.library.opcheck(kernels.stratified_add_, (x, V[:19], as_key(7), 0)),
        lambda s, x, g, V: torch.library.opcheck(kernels.stratified_take, (x, 5, as_key(7), 0)),
    ],
    ids=["transpose", "transpose_back", "outputs", "inputs", "values", "add", "take"],
)  # fmt: skip
def test_operators_are_declared_as_they_are(case) -> None:
    """Schema, mutation and shapes under FakeTensor, by torch's own check."""
    support = BlockSupport(37, 53, 0.1, name="a.q", seed=0, device=DEVICE)
    x, g = made(19, 53, dtype=torch.float32, seed=0), made(19, 37, dtype=torch.float32, seed=1)
    case(support, x, g, made(37, support.k, dtype=torch.float32, seed=2))


def test_no_tokens() -> None:
    support = BlockSupport(37, 53, 0.1, name="a.q", seed=0, device=DEVICE)
    y, dx, dV = block_products(
        support, torch.ones(37, support.k, device=DEVICE), torch.ones(0, 53, device=DEVICE),
        torch.ones(0, 37, device=DEVICE),
    )  # fmt: skip
    assert y.shape == (0, 37) and dx.shape == (0, 53) and not dV.any()
