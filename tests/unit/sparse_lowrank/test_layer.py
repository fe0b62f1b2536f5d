"""The operator against a dense float64 autograd oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sltrain_dist.sparse_lowrank import LowRankLinear, RandomSupport, SLLinear, sl_linear

SHAPES = {
    "square": (24, 24, 6),
    "wide": (13, 67, 5),
    "tall": (67, 13, 13),
    "1B's MLP, an eighth": (683, 256, 64),
    "primes": (101, 59, 7),
    "one output": (1, 40, 1),
    "one input": (40, 1, 1),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_layer(m: int, n: int, r: int, dtype: torch.dtype, bias: bool = False, density: float = 0.1) -> SLLinear:
    layer = SLLinear(n, m, r, density, alpha=2.0, bias=bias, name="layer", seed=1, dtype=dtype)
    with torch.no_grad():
        nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(2))  # it starts at 0, which hides errors
        if layer.bias is not None:
            nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(3))
    return layer


def oracle(layer: SLLinear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and gradients by autograd through an explicit dense weight, in float64."""
    x, g = x.double(), g.double()
    leaves = {k: p.detach().double().requires_grad_() for k, p in layer.named_parameters()}
    x.requires_grad_()
    m, n = layer.out_features, layer.in_features
    sparse = torch.zeros(m * n, dtype=torch.float64).index_put((layer.support.indices(),), leaves["V"].flatten())
    weight = layer.alpha / layer.rank * leaves["B"] @ leaves["A"] + sparse.view(m, n)
    y = x @ weight.t() + leaves.get("bias", torch.zeros(m, dtype=torch.float64))
    y.backward(g)
    return {"y": y.detach(), "x": x.grad, **{k: leaf.grad for k, leaf in leaves.items()}}


def results(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(g.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{k: p.grad for k, p in layer.named_parameters()}}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for key in want:
        error = (got[key].double() - want[key].double()).norm() / want[key].double().norm()
        assert error <= tolerance, f"{key}: relative error {error:.2e}"


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tokens", [(9,), (2, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_equals_dense_oracle(
    shape: tuple[int, int, int], dtype: torch.dtype, tokens: tuple[int, ...], bias: bool
) -> None:
    m, n, r = shape
    layer = make_layer(m, n, r, dtype, bias)
    x, g = made((*tokens, n), dtype, 4), made((*tokens, m), dtype, 5)
    assert_close(results(layer, x, g), oracle(layer, x, g), TOLERANCE[dtype])


def test_gradcheck() -> None:
    layer = make_layer(7, 5, 3, torch.float64, bias=True)
    x = made((2, 3, 5), torch.float64, 6).requires_grad_()

    def f(x: Tensor, B: Tensor, A: Tensor, V: Tensor, bias: Tensor) -> Tensor:
        return sl_linear(x, B, A, V, layer.support, layer.scale, bias)

    leaves = (layer.B, layer.A, layer.V, layer.bias)
    assert torch.autograd.gradcheck(f, (x, *leaves))


def test_autocast_computes_in_its_type_and_keeps_gradients_in_the_parameters() -> None:
    layer = make_layer(33, 17, 5, torch.float32, bias=True)
    x, g = made((6, 17), torch.float32, 7), made((6, 33), torch.float32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.requires_grad_())
    y.backward(g.bfloat16())
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    got = {"y": y.detach(), "x": x.grad, **{k: p.grad for k, p in layer.named_parameters()}}
    assert_close(got, oracle(layer, x.detach(), g), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer = make_layer(33, 17, 5, torch.float32)
    x, g = made((6, 17), torch.float32, 7), made((6, 33), torch.float32, 8)
    want = results(layer, x, g)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(g)
    got = {"y": y.detach(), "x": x.grad, **{k: p.grad for k, p in layer.named_parameters()}}
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    layer = make_layer(33, 17, 5, torch.float32, bias=True)
    x, g = made((6, 17), torch.float32, 7), made((6, 33), torch.float32, 8)
    want = results(layer, x, g)
    # aot_eager traces forward and backward as inductor does, without its C++ compilation.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x.requires_grad_())
    layer.zero_grad()
    y.backward(g)
    got = {"y": y.detach(), "x": x.grad, **{k: p.grad for k, p in layer.named_parameters()}}
    assert_close(got, want, 1e-6)


def test_nothing_of_the_size_of_w_is_saved_for_backward() -> None:
    m, n, tokens = 64, 48, 4
    layer = make_layer(m, n, 4, torch.float32)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(made((tokens, n), torch.float32, 9).requires_grad_())
    assert saved
    assert max(saved) < m * n // 2


@pytest.mark.parametrize("tokens", [(0,), (2, 0), (1,)], ids=str)
def test_few_or_no_tokens(tokens: tuple[int, ...]) -> None:
    layer = make_layer(11, 7, 3, torch.float32)
    x, g = made((*tokens, 7), torch.float32, 1), made((*tokens, 11), torch.float32, 2)
    got, want = results(layer, x, g), oracle(layer, x, g)
    for key in want:
        torch.testing.assert_close(got[key].double(), want[key], rtol=1e-5, atol=1e-7)


def test_non_contiguous_input() -> None:
    layer = make_layer(11, 7, 3, torch.float64)
    x, g = made((7, 5), torch.float64, 1).t(), made((11, 5), torch.float64, 2).t()
    assert_close(results(layer, x, g), oracle(layer, x, g), 1e-12)


def test_frozen_parameters_get_no_gradient() -> None:
    layer = make_layer(11, 7, 3, torch.float32)
    layer.A.requires_grad_(False)
    layer(made((4, 7), torch.float32, 1)).sum().backward()
    assert layer.A.grad is None
    assert layer.B.grad is not None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"rank": 9}, "rank = 9"),
        ({"density": 0.0}, r"outside \(0, 1\]"),
        ({"density": 1.5}, r"outside \(0, 1\]"),
        ({"density": 1e-3}, "leaves no position"),
        ({"support": "diagonal"}, "support"),
        ({"path": "fast"}, "path"),
    ],
)
def test_bad_layers(kwargs: dict[str, object], message: str) -> None:
    arguments = {"rank": 2, "density": 0.2, "alpha": 1.0, **kwargs}
    with pytest.raises(ValueError, match=message):
        SLLinear(8, 9, **arguments)


def test_bad_calls() -> None:
    layer = make_layer(11, 7, 3, torch.float32)
    with pytest.raises(ValueError, match="last dimension"):
        layer(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="autocast"):
        layer(torch.zeros(4, 7, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="support needs"):
        sl_linear(torch.zeros(4, 7), layer.B, layer.A, layer.V[1:], layer.support, 1.0)


def test_initial_weight_is_the_sparse_part_alone() -> None:
    layer = SLLinear(50, 40, 4, 0.1, 8.0, name="a", seed=3)
    weight = layer.dense_weight()
    assert torch.count_nonzero(weight) == layer.support.nnz == int(0.1 * 40 * 50)
    assert torch.equal(weight.flatten()[layer.support.indices()], layer.V)
    assert layer.V.abs().max() <= 50**-0.5
    assert layer.A.abs().max() <= 50**-0.5
    assert float(layer.A.detach().std()) == pytest.approx((3 * 50) ** -0.5, rel=0.1)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    def layer(name: str, seed: int) -> SLLinear:
        return SLLinear(50, 40, 4, 0.1, 8.0, name=name, seed=seed)

    one, same, other_name, other_seed = layer("a", 3), layer("a", 3), layer("b", 3), layer("a", 4)
    assert torch.equal(one.A, same.A)
    assert torch.equal(one.support.indices(), same.support.indices())
    for other in (other_name, other_seed):
        assert not torch.equal(one.A, other.A)
        assert not torch.equal(one.support.indices(), other.support.indices())


def test_initial_values_without_a_seed_are_drawn_from_torchs_generator() -> None:
    def drawn(seed: int) -> list[dict[str, Tensor]]:
        torch.manual_seed(seed)
        return [SLLinear(50, 40, 4, 0.1, 8.0).state_dict(), LowRankLinear(50, 40, 4, 8.0).state_dict()]

    one, same, other = drawn(1), drawn(1), drawn(2)
    for a, b, c in zip(one, same, other, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not torch.equal(a["A"], c["A"])
    two = LowRankLinear(50, 40, 4, 8.0)
    before = two.B.detach().clone()
    two.reset_parameters()
    assert not torch.equal(two.B, before)


def test_low_rank_layer_has_the_variance_of_a_dense_one() -> None:
    layer = LowRankLinear(400, 300, 50, 16.0, name="a")
    assert float(layer.dense_weight().var()) == pytest.approx(1 / (3 * 400), rel=0.1)
    x = made((5, 400), torch.float32, 1)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().t(), rtol=1e-4, atol=1e-5)


class TestRandomSupport:
    @pytest.mark.parametrize(
        ("m", "n", "density"), [(7, 11, 0.01999), (7, 11, 0.5), (7, 11, 0.97), (7, 11, 1.0), (64, 48, 0.03)]
    )
    def test_exact_count_sorted_and_distinct(self, m: int, n: int, density: float) -> None:
        support = RandomSupport(m, n, density, seed=5, name="x")
        positions = support.indices()
        assert support.columns.dtype == torch.int16
        assert support.row_positions(0, m).dtype == torch.int32
        assert len(positions) == support.nnz == int(density * m * n)
        assert torch.all(positions[1:] > positions[:-1])
        assert positions[0] >= 0
        assert positions[-1] < m * n

    def test_known_answer(self) -> None:
        """The positions are part of the checkpoint format: they must never change."""
        support = RandomSupport(6, 7, 0.2, seed=0, name="model.layers.0.self_attn.q_proj")
        assert support.indices().tolist() == KNOWN_POSITIONS
        assert support.fingerprint() == KNOWN_FINGERPRINT

    def test_every_position_is_equally_likely(self) -> None:
        m, n, density, draws = 6, 10, 0.3, 2000
        counts = torch.zeros(m * n)
        for seed in range(draws):
            counts[RandomSupport(m, n, density, seed=seed, name="x").indices()] += 1
        expected = draws * density
        chi2 = float(((counts - expected) ** 2 / (expected * (1 - density))).sum())
        # Mean 59 (one constraint), standard deviation √(2·59) ≈ 11: five of them.
        assert 59 - 55 < chi2 < 59 + 55

    def test_fingerprint_sees_a_changed_position(self) -> None:
        support = RandomSupport(30, 30, 0.1, seed=1, name="x")
        before = support.fingerprint()
        support.columns[3] += 1
        assert support.fingerprint() != before

    @pytest.mark.parametrize("n", [2**15, 2**15 + 1])
    def test_wide_layers_have_all_columns(self, n: int) -> None:
        support = RandomSupport(3, n, 1.0, name="x")
        assert support.columns.dtype == (torch.int16 if n == 2**15 else torch.int32)
        assert torch.equal(support.indices(), torch.arange(3 * n))
        assert torch.equal(support.row_positions(1, 3), torch.arange(2 * n, dtype=torch.int32))


KNOWN_POSITIONS = [0, 2, 8, 14, 15, 17, 35, 41]
KNOWN_FINGERPRINT = "42dfe4704e346012"
