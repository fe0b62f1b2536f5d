"""The operator and a whole update on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.models.build import build_model
from sltrain_dist.numerics.int8_weight import Int8Weight, parts_of, plain
from sltrain_dist.parallel.checkpointing import prepare_layers
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.sparse_lowrank import SLLinear
from sltrain_dist.train.build import start_engine
from tests.unit.models.test_model import small, tokens, warmed
from tests.unit.models.test_reset_attention import SHAPES as HEADS
from tests.unit.models.test_reset_attention import batch, fused_calls
from tests.unit.sparse_lowrank.test_layer import SHAPES, assert_close, made, make_layer, oracle, results

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_operator_equals_oracle(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    m, n, r = shape
    layer = make_layer(m, n, r, dtype, bias=True)
    x, g = made((2, 5, n), dtype, 4), made((2, 5, m), dtype, 5)
    want = oracle(layer, x, g)
    got = results(layer.cuda(), x.cuda(), g.cuda())
    assert_close({key: value.cpu() for key, value in got.items()}, want, tolerance)


def test_model_starts_from_the_same_weights_as_on_the_cpu() -> None:
    cpu, cuda = build_model(small()).state_dict(), build_model(small(), "cuda").state_dict()
    assert all(torch.equal(cpu[name], cuda[name].cpu()) for name in cpu)


@pytest.mark.parametrize("shape", list(HEADS.values()), ids=list(HEADS))
def test_documents_of_a_row_do_not_see_each_other_as_on_the_cpu(shape: dict[str, int]) -> None:
    losses, gradients = {}, {}
    for device in ("cpu", "cuda"):
        model = warmed(small(model=shape)).double().to(device)
        loss = model(*(part.to(device) for part in batch()))
        loss.backward()
        losses[device] = float(loss.detach())
        gradients[device] = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-10)
    for name, gradient in gradients["cpu"].items():
        torch.testing.assert_close(gradients["cuda"][name], gradient, rtol=1e-7, atol=1e-10, msg=name)
    for dtype in ("fp32", "bf16", "mixed"):
        config = small(model=shape, train={"dtype": dtype})
        assert fused_calls(warmed(config).cuda(), tokens(config, 5).cuda()) == config.model.num_layers


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_lowers_the_loss_as_on_the_cpu(dtype: str) -> None:
    config = small(train={"dtype": dtype}, optim={"lr": 0.01})
    ids = tokens(config, 4)
    losses = {}
    for device in ("cpu", "cuda"):
        env = Environment(0, 1, 0, torch.device(device))
        engine = DDPEngine(build_model(config, device), config.optim, env)
        losses[device] = []
        for _ in range(20):
            loss = engine.micro_step(ids.to(device), ids.to(device), 1 / ids.numel(), last=True)
            engine.clip_gradients()
            engine.update()
            losses[device].append(float(loss) / ids.numel())
    assert losses["cuda"][-1] < losses["cuda"][0] - 0.5
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3 if dtype == "fp32" else 5e-2)


@pytest.mark.parametrize(
    "weights",
    [
        *({"support": support, "path": "factored"} for support in ("random", "stratified", "blocks")),
        {"support": "random", "path": "materialize"},
        {"support": "random", "path": "materialize", "row_block_bytes": 1 << 12},
        {"method": "full"},
        {"method": "lowrank"},
    ],
    ids=str,
)
def test_compiled_blocks_have_the_gradients_of_eager_ones(weights: dict[str, Any]) -> None:
    gradients = []
    for compiled in (False, True):
        torch.compiler.reset()
        config = small(reparam=weights, train={"compile": compiled})
        model = warmed(config).cuda()
        prepare_layers(model, config.train)
        ids = tokens(config, 3).cuda()
        model(ids, ids).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "weights", [{"support": "random", "path": "materialize"}, {"support": "blocks", "path": "factored"}], ids=str
)
def test_kept_products_change_no_gradient(weights: dict[str, Any], compiled: bool) -> None:
    """The layers are computed again in the thread of the backward pass, which is another one on a GPU."""
    gradients = []
    kept = {"activation_checkpointing": "selective", "checkpoint_policy": "ops", "compile": compiled}
    for train in ({}, kept):
        torch.compiler.reset()
        config = small(reparam=weights, train=train)
        model = warmed(config).cuda()
        prepare_layers(model, config.train)
        ids = tokens(config, 3).cuda()
        model(ids, ids).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("support", ["random", "stratified", "blocks"])
def test_factored_layers_of_narrow_types_equal_the_oracle(support: SupportKind, dtype: torch.dtype) -> None:
    layer = SLLinear(96, 67, 8, 0.1, 8.0, support=support, path="factored", name="a.q", seed=1, dtype=dtype)
    torch.nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(2))
    x, g = made((130, 96), dtype, 4), made((130, 67), dtype, 5)
    want = oracle(layer, x, g)
    got = results(layer.cuda(), x.cuda(), g.cuda())
    assert_close({key: value.cpu() for key, value in got.items()}, want, 2e-2)


@pytest.mark.parametrize("shape", [(67, 129), (10_007,)], ids=str)
def test_int8_weights_are_rounded_as_on_the_cpu(shape: tuple[int, ...]) -> None:
    first, then = made(shape, torch.float32, 1), made(shape, torch.float32, 2)
    weights = {}
    for device in ("cpu", "cuda"):
        weight = weights[device] = Int8Weight.empty(shape, torch.bfloat16, device)
        weight.copy_(first)
        weight.write_stochastic(0, then.to(device, copy=True).flatten(), key=3)
    for name, part in parts_of(weights["cpu"]).items():
        assert torch.equal(parts_of(weights["cuda"])[name].cpu(), part), name
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(plain(weights["cuda"], dtype).cpu(), plain(weights["cpu"], dtype))


@pytest.mark.parametrize("support", ["random", "stratified", "blocks"])
def test_int8_weights_train_as_on_the_cpu(support: str) -> None:
    """Per-layer updates, on a GPU by the Triton kernels where there are any."""
    config = small(
        reparam={"weight_bits": 8, "support": support},
        train={"dtype": "bf16", "activation_checkpointing": "full"},
        optim={"lr": 0.01, "state_bits": 8, "update": "per_layer"},
    )
    ids = tokens(config, 4)
    losses: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for device, found in losses.items():
        env = Environment(0, 1, 0, torch.device(device))
        engine = start_engine(config, env)
        assert {t.dtype for t in engine.tensors()["parameters"]} == {torch.int8, torch.float32, torch.bfloat16}
        norm = None
        for _ in range(20):
            engine.begin_update(0.01, norm)
            loss = engine.micro_step(ids.to(device), ids.to(device), 1 / ids.numel(), last=True)
            norm = engine.clip_gradients()
            engine.update()
            found.append(float(loss) / ids.numel())
    assert losses["cuda"][-1] < losses["cuda"][0] - 0.5
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-2)
