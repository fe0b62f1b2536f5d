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
from sltrain_dist.sparse_lowrank.paths import blocks_on_gpu
from sltrain_dist.sparse_lowrank.paths.blocks_on_gpu import align_rows
from sltrain_dist.sparse_lowrank.supports import stratified
from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport
from sltrain_dist.sparse_lowrank.supports.stratified import StratifiedSupport, stratified_column

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Relative errors, ‖out − ref‖ / ‖ref‖; the interpreter truncates what it casts to bf16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# (m, n, density, tokens, rank): windows that overlap, uneven and empty windows, one window, tiny sums, primes; runs
# that are whole tiles, and runs that begin and end between multiples of 8.
SHAPES = [
    (37, 53, 0.1, 19, 4),
    (3, 37, 0.05, 3, 1),
    (24, 20, 1.0, 33, 5),
    (7, 7, 0.01, 1, 2),
    (70, 83, 0.8, 17, 3),
    (62, 100, 0.25, 21, 20),
    (90, 261, 0.25, 40, 17),
]
# Several tiles, chunks of tokens and steps of every sum; too slow to interpret in number.
LARGE = (
    [(70, 83, 0.8, 515, 40)]
    if INTERPRETED
    else [(1365, 2048, 0.03, 1100, 128), (5461, 2048, 0.03, 8192, 512), (4096, 11008, 0.05, 2048, 1024)]
)
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


def check_blocks(shape: tuple[int, int, float, int, int], dtype: torch.dtype) -> None:
    """Every product against the definition in float64, from the positions alone."""
    m, n, density, tokens, rank = shape
    support = BlockSupport(m, n, density, name="a.q", seed=0, device=DEVICE)
    x, g, h = (made(tokens, width, dtype=dtype, seed=i) for i, width in enumerate((n, m, 2 * rank)))
    B, V, base = made(m, rank, dtype=dtype, seed=3), made(m, support.k, dtype=dtype, seed=4), x.roll(1)
    h = h[:, rank:]  # as of the second layer of two
    S = torch.zeros(m * n, dtype=torch.float64, device=DEVICE).index_put((support.indices(),), V.double().flatten())
    S = S.view(m, n)

    def results() -> list[Tensor]:
        s, inputs, grads = support, kernels.transpose(x), align_rows(g)
        outputs = (inputs, V, s.window_inputs, s.shift, tokens)
        once = kernels.blocks_inputs(grads, V, s.windows, s.shift, None)
        twice = kernels.blocks_inputs(grads, V, s.windows, s.shift, once)
        return [
            kernels.blocks_outputs(*outputs, None, None),
            kernels.blocks_outputs(*outputs, h, B),
            *(kernels.restore_inputs(total, base, s.input_places, s.k) for total in (once, twice)),
            kernels.blocks_values(grads, inputs, s.window_inputs, s.shift, m, s.k),
        ]

    y, dx = x.double() @ S.t(), g.double() @ S
    dV = (g.double().t() @ x.double()).flatten()[support.indices()].view(m, support.k)
    expected = [y, y + h.double() @ B.double().t(), base + dx, base + 2 * dx, dV]
    first = results()
    for out, right in zip(first, expected, strict=True):
        assert error(out, right) < TOLERANCE[dtype]
    # No sum depends on the order in which programs happen to run.
    assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_products_of_blocks(shape: tuple[int, int, float, int, int], dtype: torch.dtype) -> None:
    check_blocks(shape, dtype)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_products_of_blocks_over_many_tiles(shape: tuple[int, int, float, int, int]) -> None:
    for dtype in [torch.float32] if INTERPRETED else TOLERANCE:
        check_blocks(shape, dtype)


@each_dtype
def test_transposing_pads_with_zeros(dtype: torch.dtype) -> None:
    x = made(67, 75, dtype=dtype, seed=0)[:, :71]
    x_t = kernels.transpose(x)
    assert x_t.shape == (71, 80) and torch.equal(x_t[:, :67], x.t()) and not x_t[:, 67:].any()


@each_dtype
@pytest.mark.parametrize("width", [5, 8, 16, 24])
def test_rows_are_aligned(width: int, dtype: torch.dtype) -> None:
    x = made(4, width, dtype=dtype, seed=0)
    out = align_rows(x)
    assert out.is_contiguous() and torch.equal(out[:, :width], x) and not out[:, width:].any()
    assert out is x if dtype == torch.float32 or width % 8 == 0 else out.stride(0) * dtype.itemsize % 32 == 0
    assert torch.equal(align_rows(x.t())[:, :4], x.t())


def test_a_gradient_that_is_not_finite_stays_with_its_token() -> None:
    """Padding and other tokens must be masked, not multiplied by zero; windows without an output get zeros."""
    m, n = 3, 37  # 19 windows, of which 16 have no output
    support = BlockSupport(m, n, 0.05, name="a.q", seed=0, device=DEVICE)
    g = torch.ones(3, m, device=DEVICE)
    g[1] = float("inf")
    V, zeros = torch.ones(m, support.k, device=DEVICE), torch.zeros(3, n, device=DEVICE)
    total = kernels.blocks_inputs(g, V, support.windows, support.shift, None)
    dx = kernels.restore_inputs(total, zeros, support.input_places, support.k)
    used = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    used[support.indices() % n] = True
    assert bool(dx[[0, 2]].isfinite().all()) and not bool(dx[1, used].isfinite().any()) and not dx[0, ~used].any()
    x = torch.ones(3, n, device=DEVICE)
    x[1] = float("inf")
    outputs = (kernels.transpose(x), V, support.window_inputs, support.shift, 3)
    y = kernels.blocks_outputs(*outputs, x[:, :2].contiguous(), V[:, :2].contiguous())
    assert bool(y[[0, 2]].isfinite().all()) and not bool(y[1].isfinite().any())


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_use_the_kernels_and_agree(
    support: str, path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that share their input, forward and backward, against float64, which torch's implementation computes.

    In bf16, rows are not aligned and the low-rank product is in the kernel. One layer permutes its inputs differently.
    """

    def run(dtype: torch.dtype) -> list[Tensor]:
        layers = [
            SLLinear(
                53, m, 4, 0.1, 6, support=support, path=path, row_block_bytes=53 * 4 * 10,
                name=name, seed=0, device=DEVICE, dtype=dtype,
            )
            for m, name in ((37, "a.q"), (24, "a.k"), (22, "b.q"))
        ]  # fmt: skip
        for layer in layers:
            for i, parameter in enumerate(layer.parameters()):
                parameter.data = made(*parameter.shape, dtype=torch.bfloat16, seed=i).to(dtype)
        x = made(19, 53, dtype=torch.bfloat16, seed=5).to(dtype).requires_grad_()
        outputs = apply_shared(layers, x)
        torch.autograd.backward(outputs, [made(*y.shape, dtype=torch.bfloat16, seed=6).to(dtype) for y in outputs])
        return [*outputs, x.grad, *(p.grad for layer in layers for p in layer.parameters())]

    calls = []
    for name in ("stratified_add_", "stratified_take", "blocks_outputs", "blocks_inputs", "blocks_values"):
        for module in (stratified, blocks_on_gpu):
            if hasattr(module, name):
                original = getattr(module, name)
                monkeypatch.setattr(module, name, lambda *a, o=original, n=name: calls.append(n) or o(*a))
    results = run(dtype)
    if support == "blocks" and path == "factored":
        assert set(calls) == {"blocks_outputs", "blocks_inputs", "blocks_values"}
    if support == "stratified" and path == "materialize":
        assert {"stratified_add_"} <= set(calls)
    calls.clear()
    for out, expected in zip(results, run(torch.float64), strict=True):
        assert error(out, expected) < (1e-5 if dtype == torch.float32 else 2e-2)
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
            kernels.restore_inputs, (kernels.blocks_inputs(g, V, s.windows, s.shift, None), x, s.input_places, s.k)
        ),
        lambda s, x, g, V: torch.library.opcheck(
            kernels.blocks_outputs, (kernels.transpose(x), V, s.window_inputs, s.shift, 19, x[:, :4], V[:, :4].clone())
        ),
        lambda s, x, g, V: torch.library.opcheck(kernels.blocks_inputs, (g, V, s.windows, s.shift, None)),
        lambda s, x, g, V: torch.library.opcheck(
            kernels.blocks_values, (g, kernels.transpose(x), s.window_inputs, s.shift, s.m, s.k)
        ),
        lambda s, x, g, V: torch.library.opcheck(kernels.stratified_add_, (x, V[:19], as_key(7), 0)),
        lambda s, x, g, V: torch.library.opcheck(kernels.stratified_take, (x, 5, as_key(7), 0)),
    ],
    ids=["transpose", "restore", "outputs", "inputs", "values", "add", "take"],
)  # fmt: skip
def test_operators_are_declared_as_they_are(case) -> None:
    """Schema, mutation and shapes under FakeTensor, by torch's own check."""
    support = BlockSupport(37, 53, 0.1, name="a.q", seed=0, device=DEVICE)
    x, g = made(19, 53, dtype=torch.float32, seed=0), made(19, 37, dtype=torch.float32, seed=1)
    case(support, x, g, made(37, support.k, dtype=torch.float32, seed=2))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    layer = SLLinear(53, 37, 4, 0.1, 6, support="blocks", path="factored", name="a.q", seed=0, device=DEVICE)
    x = torch.ones(tokens, 53, device=DEVICE, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (tokens, 37) and x.grad.shape == (tokens, 53)
    assert bool(layer.V.grad.any()) == (tokens > 0)
    if tokens == 0:  # layers leave that to torch
        s, V, grads = layer.support, layer.V.detach(), y.detach()
        inputs = kernels.transpose(x.detach())
        assert kernels.blocks_outputs(inputs, V, s.window_inputs, s.shift, 0, None, None).shape == (0, 37)
        total = kernels.blocks_inputs(grads, V, s.windows, s.shift, None)
        assert kernels.restore_inputs(total, x.detach(), s.input_places, s.k).shape == (0, 53)
        assert not kernels.blocks_values(grads, inputs, s.window_inputs, s.shift, s.m, s.k).any()
