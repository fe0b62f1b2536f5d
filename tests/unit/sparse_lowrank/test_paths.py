"""Every support by every path, against a dense float64 autograd oracle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.sparse_lowrank import SLLinear, functional
from sltrain_dist.sparse_lowrank.cost import ROUTES, Route
from sltrain_dist.sparse_lowrank.layer import apply_shared
from sltrain_dist.sparse_lowrank.supports.support import SLICE

KINDS: tuple[SupportKind, ...] = ("random", "stratified", "blocks")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_route = pytest.mark.parametrize("route", ROUTES, ids=["dense", "mixed", "factored"])


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the route that the cost model would choose."""

    def set_route(route: Route) -> None:
        monkeypatch.setattr(functional, "route_at", lambda *args: route)

    return set_route


def make(kind: SupportKind, m: int, n: int, r: int, dtype: torch.dtype, name: str = "a.q", **kwargs: Any) -> SLLinear:
    kwargs = {"density": 0.1, "seed": 0, **kwargs}
    layer = SLLinear(n, m, r, alpha=1.5 * r, support=kind, name=name, dtype=dtype, **kwargs)
    with torch.no_grad():  # B and bias start at 0, which hides errors
        nn.init.normal_(layer.B, std=0.3, generator=torch.Generator().manual_seed(2))
        if layer.bias is not None:
            nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(3))
    return layer


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(layer: SLLinear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x, g = x.detach().double().requires_grad_(), g.double()
    leaves = {k: p.detach().double().requires_grad_() for k, p in layer.named_parameters()}
    m, n = layer.out_features, layer.in_features
    sparse = torch.zeros(m * n, dtype=torch.float64).index_put((layer.support.indices(),), leaves["V"].flatten())
    y = x @ (layer.scale * leaves["B"] @ leaves["A"] + sparse.view(m, n)).t()
    y = y + leaves["bias"] if "bias" in leaves else y
    y.backward(g)
    return {"y": y.detach(), "x": x.grad, **{k: leaf.grad for k, leaf in leaves.items()}}


def results(layer: nn.Module, x: Tensor, g: Tensor, **calls: Any) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = calls.get("call", layer)(x)
    y.backward(g.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{k: p.grad for k, p in layer.named_parameters()}}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for key in want:
        error = (got[key].double() - want[key].double()).norm() / want[key].double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{key}: relative error {error:.2e}"


def sweep() -> Iterator[tuple[Any, ...]]:
    draw = random.Random(0)
    for case in range(288):
        m, n = draw.randint(1, 90), draw.choice([draw.randint(1, 90), 256, 300])
        yield (
            case,
            KINDS[case % 3],
            ROUTES[case // 3 % 3],
            list(TOLERANCE)[case // 9 % 4],
            (m, n, draw.randint(1, min(m, n))),
            draw.choice([0.03, 0.1, 0.5, 1.0]),
            draw.choice([(1,), (7,), (33,), (2, 5), (3, 1, 4)]),
            draw.random() < 0.3,
            draw.choice([None, 1, 700, 5000]),
        )


@pytest.mark.parametrize(
    ("case", "kind", "route", "dtype", "shape", "density", "tokens", "bias", "block_bytes"), list(sweep())
)
def test_oracle_sweep(
    case: int,
    kind: SupportKind,
    route: Route,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    density: float,
    tokens: tuple[int, ...],
    bias: bool,
    block_bytes: int | None,
    force: Any,
) -> None:
    m, n, r = shape
    force(route)
    density = max(density, 1.01 / (m * n))  # at least one value
    layer = make(kind, m, n, r, dtype, density=density, bias=bias, row_block_bytes=block_bytes, seed=case)
    x, g = made((*tokens, n), dtype, case), made((*tokens, m), dtype, case + 1000)
    # Accumulating into dx and dA in the type itself, over blocks of one row, costs digits in half precision.
    worse = 6 if route.path == "materialize" and block_bytes is not None else 1
    assert_close(results(layer, x, g), oracle(layer, x, g), worse * TOLERANCE[dtype])


@each_kind
@each_route
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_more_tokens_than_a_slice(kind: SupportKind, route: Route, dtype: torch.dtype, force: Any) -> None:
    force(route)
    tokens = 2 * SLICE + 77
    layer = make(kind, 13, 300, 4, dtype)
    x, g = made((tokens, 300), dtype, 1), made((tokens, 13), dtype, 2)
    assert_close(results(layer, x, g), oracle(layer, x, g), TOLERANCE[dtype])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(33, 300, 7), (300, 33, 40)], ids=["windows overlap", "runs differ"])
def test_blocks_on_one_thread_and_on_several(
    count: int, shape: tuple[int, int, int], force: Any, threads: None
) -> None:
    """Features are picked by other operators on several."""
    torch.set_num_threads(count)
    m, n, tokens = shape
    force(Route("factored", False))
    layer = make("blocks", m, n, 5, torch.float64)
    x, g = made((tokens, n), torch.float64, 4), made((tokens, m), torch.float64, 5)
    assert_close(results(layer, x, g), oracle(layer, x, g), TOLERANCE[torch.float64])


@each_kind
@each_route
@pytest.mark.parametrize("block_bytes", [None, 150], ids=["whole", "blocks of rows"])
def test_gradcheck(kind: SupportKind, route: Route, block_bytes: int | None, force: Any) -> None:
    force(route)
    layer = make(kind, 9, 7, 3, torch.float64, bias=True, density=0.35, row_block_bytes=block_bytes)
    leaves = dict(layer.named_parameters())

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(leaves, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (made((2, 3, 7), torch.float64, 6).requires_grad_(), *leaves.values()))


def shared_layers(kind: SupportKind, dtype: torch.dtype, third: str = "b.v") -> list[SLLinear]:
    """Three layers, the last of which is of another module by default: blocks then permutes its inputs otherwise."""
    return [
        make(kind, 40, 300, 5, dtype, name="a.q", bias=True),
        make(kind, 20, 300, 7, dtype, name="a.k"),
        make(kind, 33, 300, 5, dtype, name=third),
    ]


@each_kind
@each_route
@pytest.mark.parametrize("third", ["a.v", "b.v"])
@pytest.mark.parametrize("length", [6, SLICE])
def test_layers_applied_together_compute_what_they_do_one_by_one(
    kind: SupportKind, route: Route, length: int, third: str, force: Any
) -> None:
    force(route)
    layers = shared_layers(kind, torch.float64, third)
    if kind == "stratified" and third == "b.v":
        layers[1] = make("blocks", 20, 300, 7, torch.float64, name="a.k")  # supports may differ
    x = made((2, length, 300), torch.float64, 1)
    grads = [made((2, length, layer.out_features), torch.float64, i) for i, layer in enumerate(layers)]
    want = [results(layer, x, g) for layer, g in zip(layers, grads, strict=True)]
    for layer in layers:
        layer.zero_grad()
    x = x.requires_grad_()
    outputs = apply_shared(layers, x)
    torch.autograd.backward(outputs, grads)
    for layer, y, expected in zip(layers, outputs, want, strict=True):
        got = {"y": y.detach(), **{k: p.grad for k, p in layer.named_parameters()}}
        assert_close(got, {k: v for k, v in expected.items() if k != "x"}, 1e-12)
    assert_close({"x": x.grad}, {"x": sum(w["x"] for w in want)}, 1e-12)


def test_an_output_that_is_not_used_gives_no_gradient() -> None:
    layers = shared_layers("blocks", torch.float64)
    for layer in layers:
        layer.path = "factored"
    x, g = made((6, 300), torch.float64, 1), made((6, 40), torch.float64, 2)
    want = results(layers[0], x, g)
    layers[0].zero_grad()
    x.requires_grad_()
    apply_shared(layers, x)[0].backward(g)
    assert_close({"x": x.grad, "V": layers[0].V.grad}, {k: want[k] for k in ("x", "V")}, 1e-12)
    assert float(layers[1].V.grad.abs().max()) == 0


@each_kind
@each_route
@pytest.mark.parametrize("frozen", ["x", "B", "A", "V", "x A", "x B A", "x V B"])
def test_frozen_parts_get_no_gradient_and_change_no_other(
    kind: SupportKind, route: Route, frozen: str, force: Any
) -> None:
    force(route)
    layer = make(kind, 13, 17, 4, torch.float64)
    x, g = made((6, 17), torch.float64, 1), made((6, 13), torch.float64, 2)
    want = oracle(layer, x, g)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    x.requires_grad_("x" not in frozen)
    layer(x).backward(g)
    for name, leaf in (("x", x), *layer.named_parameters()):
        if name in frozen:
            assert leaf.grad is None
        else:
            assert_close({name: leaf.grad}, {name: want[name]}, 1e-12)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def largest(layer: SLLinear, tokens: int) -> int:
    x = made((tokens, layer.in_features), torch.float32, 1).requires_grad_()
    with Largest() as mode:
        layer(x).sum().backward()
    return mode.numel


@each_kind
def test_factored_forms_nothing_of_the_size_of_w(kind: SupportKind) -> None:
    m, n = 256, 300
    layer = make(kind, m, n, 8, torch.float32, path="factored", density=0.05)
    assert largest(layer, 16) < m * n // 4


@each_kind
def test_row_blocks_bound_what_is_formed_at_a_time(kind: SupportKind, force: Any) -> None:
    force(ROUTES[0])
    m, n = 256, 300
    assert largest(make(kind, m, n, 8, torch.float32), 16) == m * n
    rows = 20
    blocked = make(kind, m, n, 8, torch.float32, row_block_bytes=4 * n * rows + 7, density=0.02)
    assert largest(blocked, 16) <= max(rows * n, m * 16, 8 * n)


@each_kind
def test_a_handful_of_tokens_does_not_rebuild_w(kind: SupportKind) -> None:
    m, n = 512, 512
    layer = make(kind, m, n, 64, torch.float32, density=0.03)
    x = made((2, n), torch.float32, 1)
    with torch.no_grad(), Largest() as mode:
        y = layer(x)
    assert mode.numel < m * n // 4
    torch.testing.assert_close(y, x @ layer.dense_weight().t(), rtol=1e-4, atol=1e-4)


@each_kind
@each_route
@pytest.mark.parametrize("third", ["a.v", "b.v"])
def test_saves_x_once_and_nothing_of_the_size_of_w(kind: SupportKind, route: Route, third: str, force: Any) -> None:
    force(route)
    layers = shared_layers(kind, torch.float32, third)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = made((4, 300), torch.float32, 9).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        apply_shared(layers, x)
    leaves = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    activations = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in leaves)
    ranks = sum(layer.rank for layer in layers) if route.path == "factored" else 0
    columns = 300
    if kind == "blocks" and route.path == "factored" and third == "a.v":  # all arrange x alike: so it is kept
        columns = layers[0].support.windows * layers[0].support.k
        assert columns > 300
    assert activations == 4 * 4 * (columns + ranks)


@each_kind
@each_route
def test_autocast(kind: SupportKind, route: Route, force: Any) -> None:
    force(route)
    layer = make(kind, 33, 17, 5, torch.float32, bias=True)
    x, g = made((6, 17), torch.float32, 7), made((6, 33), torch.float32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(layer, x, g)
    assert got["y"].dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert_close(got, oracle(layer, x, g), TOLERANCE[torch.bfloat16])


@each_kind
@each_route
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind: SupportKind, route: Route, reentrant: bool, force: Any) -> None:
    force(route)
    layer = make(kind, 33, 17, 5, torch.float32)
    x, g = made((6, 17), torch.float32, 7), made((6, 33), torch.float32, 8)
    want = results(layer, x, g)
    got = results(layer, x, g, call=lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.slow
@each_kind
@each_route
def test_compiles_without_graph_breaks(kind: SupportKind, route: Route, force: Any) -> None:
    force(route)
    torch._dynamo.reset()
    layers = [make(kind, 33, 300, 5, torch.float32, bias=True), make(kind, 20, 300, 4, torch.float32, name="a.k")]
    module = nn.ModuleList(layers)
    x, g = made((6, 300), torch.float32, 7), made((6, 53), torch.float32, 8)

    def call(x: Tensor) -> Tensor:
        return torch.cat(apply_shared(layers, x), dim=1)

    # aot_eager traces forward and backward as inductor does, without its C++ compilation.
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(results(module, x, g, call=compiled), results(module, x, g, call=call), 1e-6)


@each_kind
@each_route
def test_fake_tensors_have_the_real_shapes(kind: SupportKind, route: Route, force: Any) -> None:
    force(route)
    with FakeTensorMode():
        layer = SLLinear(300, 33, 5, 0.1, 1.0, support=kind, row_block_bytes=5000, device="cpu")
        x = torch.empty(2, 6, 300, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.shape == (2, 6, 33)
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in layer.parameters())


@each_kind
@each_route
@pytest.mark.parametrize("tokens", [(0,), (2, 0)], ids=str)
def test_no_tokens(kind: SupportKind, route: Route, tokens: tuple[int, ...]) -> None:
    layer = make(kind, 11, 7, 3, torch.float32, bias=True, path=route.path)
    got = results(layer, made((*tokens, 7), torch.float32, 1), made((*tokens, 11), torch.float32, 2))
    assert got["y"].shape == (*tokens, 11)
    for key in ("B", "A", "V", "bias"):
        assert float(got[key].abs().sum()) == 0


@each_kind
@each_route
def test_non_contiguous(kind: SupportKind, route: Route, force: Any) -> None:
    force(route)
    layer = make(kind, 11, 7, 3, torch.float64)
    with torch.no_grad():
        layer.B = nn.Parameter(layer.B.t().contiguous().t())
        layer.A = nn.Parameter(layer.A.t().contiguous().t())
    x, g = made((7, 5), torch.float64, 1).t(), made((11, 5), torch.float64, 2).t()
    assert_close(results(layer, x, g), oracle(layer, x, g), 1e-12)
    wide = made((5, 14), torch.float64, 1)[:, ::2]
    assert_close(results(layer, wide, g), oracle(layer, wide, g), 1e-12)


@each_kind
@each_route
def test_bad_calls(kind: SupportKind, route: Route) -> None:
    layer = make(kind, 11, 7, 3, torch.float32, path=route.path)
    with pytest.raises(ValueError, match="last dimension"):
        layer(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="autocast"):
        layer(torch.zeros(4, 7, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="floating-point"):
        layer(torch.zeros(4, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="V has shape"):
        functional.sl_linear(torch.zeros(4, 7), layer.B, layer.A, layer.V[1:], layer.support, 1.0)
    other = make(kind, 12, 7, 3, torch.float32)
    with pytest.raises(ValueError, match="support is for"):
        functional.sl_linear(torch.zeros(4, 7), layer.B, layer.A, layer.V, other.support, 1.0)
    with pytest.raises(ValueError, match="same rank"):
        functional.sl_linear(torch.zeros(4, 7), layer.B, layer.A[1:], layer.V, layer.support, 1.0)


def test_bad_row_blocks() -> None:
    with pytest.raises(ValueError, match="row_block_bytes"):
        SLLinear(8, 9, 2, 0.2, 1.0, row_block_bytes=0)
