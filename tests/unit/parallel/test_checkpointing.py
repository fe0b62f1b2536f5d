"""Activation checkpointing and compilation of decoder layers: same numbers, less kept, one trace."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain_dist.config.load import build_config, merged
from sltrain_dist.config.schema import Config
from sltrain_dist.models.build import build_model
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.parallel.checkpointing import prepare_layers
from sltrain_dist.tracking.live_bytes import LiveBytes
from tests.support.products import Products

FULL = {"activation_checkpointing": "full"}
EVERY_SECOND = {"activation_checkpointing": "selective"}
ALL_BUT_ATTENTION = {"activation_checkpointing": "selective", "checkpoint_policy": "attention"}
ALL_BUT_PRODUCTS = {"activation_checkpointing": "selective", "checkpoint_policy": "ops"}

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lowrank": {"method": "lowrank"},
    **{
        f"{support}, {path}": {"support": support, "path": path}
        for support in ("random", "stratified", "blocks")
        for path in ("materialize", "factored")
    },
    "by rows": {"path": "materialize", "row_block_bytes": 512},
}
"""Every way to apply the linear layers, as the section `reparam`."""


def config(support: str = "random", layers: int = 4, **train: Any) -> Config:
    return build_config(
        {
            "model": {
                "vocab_size": 61,
                "hidden_size": 32,
                "intermediate_size": 44,
                "num_layers": layers,
                "num_heads": 4,
                "init_std": 0.2,
            },
            "reparam": {"rank": 6, "density": 0.1, "alpha": 12.0, "support": support},
            "data": {"seq_len": 16},
            "train": {"steps": 1, "dtype": "fp32", **train},
        }
    )


def prepared(settings: Config) -> LlamaForCausalLM:
    model = build_model(settings)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        prepare_layers(model, settings.train)
    return model


def loss_of(model: LlamaForCausalLM) -> Tensor:
    ids = torch.arange(32).view(2, 16) * 7 % 61
    return model(ids, ids)


class Calls(TorchDispatchMode):
    """Counts attention's forward calls."""

    attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.attention += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def kept_bytes(model: LlamaForCausalLM) -> int:
    """Bytes that autograd keeps for the backward pass, beyond the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in own)


WAYS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "every second": EVERY_SECOND,
    "all but attention": ALL_BUT_ATTENTION,
    "all but products": ALL_BUT_PRODUCTS,
}


@pytest.mark.parametrize("support", ["random", "stratified", "blocks"])
@pytest.mark.parametrize("way", WAYS)
def test_same_loss_and_gradients(support: str, way: str) -> None:
    assert_same_loss_and_gradients(config(support), config(support, **WAYS[way]))


def assert_same_loss_and_gradients(one: Config, other: Config) -> None:
    plain, changed = prepared(one), prepared(other)
    losses = [loss_of(model) for model in (plain, changed)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, want), (name_, got) in zip(plain.named_parameters(), changed.named_parameters(), strict=True):
        assert name == name_  # no wrapper has changed it
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


def test_what_is_kept() -> None:
    kept = {
        name: kept_bytes(prepared(config(**train)))
        for name, train in (("none", {}), ("half", EVERY_SECOND), ("full", FULL))
    }
    assert kept["full"] < kept["half"] < kept["none"]
    # Between blocks there is one residual stream for each: (2, 16, 32) floats.
    blocks = config().model.num_layers
    assert kept["none"] - kept["full"] > blocks * 10 * 2 * 16 * 32 * 4


@pytest.mark.parametrize(
    ("train", "calls"), [({}, 4), (ALL_BUT_ATTENTION, 4), (ALL_BUT_PRODUCTS, 4), (EVERY_SECOND, 6), (FULL, 8)]
)
def test_attention_is_computed_again_only_where_it_should_be(train: dict[str, Any], calls: int) -> None:
    model = prepared(config(**train))
    with Calls() as counted:
        loss_of(model).backward()
    assert counted.attention == calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("support", "path", "train"),
    [
        ("random", "factored", FULL),
        ("stratified", "factored", {}),
        ("blocks", "materialize", FULL),
    ],
)
def test_compiled_layers_compute_the_same_and_share_a_trace(support: str, path: str, train: dict[str, Any]) -> None:
    """Every layer is the same code: with one trace each, a model of many layers would hit torch's limit, which is 8."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (
        build_config(merged(config(support, layers=9, **how).model_dump(), {"reparam": {"path": path}}))
        for how in ({}, {"compile": True, **train})
    )
    assert_same_loss_and_gradients(plain, compiled)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_mixed_precision_keeps_parameters_and_the_residual_stream_in_float32() -> None:
    model = prepared(config(**{"dtype": "mixed"}))
    types: set[torch.dtype] = set()
    inner: set[torch.dtype] = set()
    model.model.layers[0].register_forward_hook(lambda module, args, output: types.add(output.dtype))
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: inner.add(output.dtype))
    loss = loss_of(model)
    loss.backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert types == {torch.float32}
    assert inner == {torch.bfloat16}
    torch.testing.assert_close(loss, loss_of(prepared(config())), rtol=1e-2, atol=0)


BATCH, LENGTH, LAYERS = 3, 24, 2
TOKENS = BATCH * LENGTH
WIDE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 88, "num_layers": LAYERS, "num_heads": 4}
"""No width is the number of tokens, and heads are grouped: queries are 32 wide, keys and values 16."""


def wide(reparam: dict[str, Any], **train: Any) -> Config:
    return build_config(
        {
            "model": {**WIDE, "num_kv_heads": 2, "init_std": 0.2},
            "reparam": {"rank": 6, "density": 0.1, "alpha": 12.0, **reparam},
            "data": {"seq_len": LENGTH},
            "train": {"steps": 1, "dtype": "fp32", **train},
        }
    )


def documents(packed: bool) -> Tensor | None:
    """Positions of two documents in each row."""
    return torch.cat((torch.arange(9), torch.arange(LENGTH - 9))).expand(BATCH, LENGTH) if packed else None


def trained(settings: Config, packed: bool = False) -> tuple[Tensor, dict[str, Tensor], int, int]:
    """The loss, the gradients, the bytes kept for the backward pass, and most bytes, both beyond what there was."""
    model = prepared(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):  # 0 at first, which would hide what is computed from it
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).sin().view_as(parameter))
    ids = torch.arange(TOKENS).view(BATCH, LENGTH) * 7 % 61
    with LiveBytes() as followed:
        followed.add([*model.parameters(), *model.buffers(), ids])
        before = followed.live
        loss = model(ids, ids, documents(packed))
        kept = followed.live - before
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, kept, followed.peak - before


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "packed"), [("fp32", False), ("bf16", True), ("mixed", True)])
@pytest.mark.parametrize("method", METHODS)
def test_policies_change_no_bit_and_keep_less(method: str, dtype: str, packed: bool) -> None:
    runs = [
        trained(wide(METHODS[method], dtype=dtype, **how), packed)
        for how in ({}, ALL_BUT_PRODUCTS, ALL_BUT_ATTENTION, FULL)
    ]
    (loss, gradients, *_), kept, peaks = runs[0], [run[2] for run in runs], [run[3] for run in runs]
    assert kept == sorted(set(kept), reverse=True)
    assert peaks[0] > peaks[1] > peaks[2] >= peaks[3]
    for other, others, *_ in runs[1:]:
        assert torch.equal(other, loss)
        for name, gradient in gradients.items():
            assert torch.equal(others[name], gradient), name


@pytest.mark.parametrize("bits", [16, 8])
def test_int8_weights_change_no_bit(bits: int) -> None:
    """Their values are made in the computation that is not repeated."""
    (loss, gradients, *_), (other, others, *_) = (
        trained(wide({"weight_bits": bits}, dtype="bf16", **how)) for how in ({}, ALL_BUT_PRODUCTS)
    )
    assert torch.equal(other, loss)
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name


@pytest.mark.parametrize("method", METHODS)
def test_products_are_kept_and_nothing_else(method: str) -> None:
    """To the byte, beyond what `full` keeps; nothing is of the size of a weight, and down_proj's output is not read."""
    hidden, keys, wider = 32, 2 * 16, 88
    outputs = 2 * hidden + keys + 2 * wider  # q, o; k, v; gate, up
    inner = 7 * 6 if "factored" in method or method == "lowrank" else 0  # x·Aᵀ of the seven layers
    attention = hidden + 4  # and a float32 scalar for each head
    full, products = (trained(wide(METHODS[method], **how))[2] for how in (FULL, ALL_BUT_PRODUCTS))
    unread = 4  # one number in the place of down_proj's output
    assert products - full == LAYERS * ((outputs + inner + attention) * 4 * TOKENS + unread)


@pytest.mark.parametrize("method", METHODS)
def test_no_product_is_computed_again(method: str) -> None:
    calls = []
    for how in ({}, ALL_BUT_PRODUCTS, FULL):
        model = prepared(wide(METHODS[method], **how))
        ids = torch.arange(TOKENS).view(BATCH, LENGTH) % 61
        with Products() as products:
            model(ids, ids).backward()
        calls.append(products.calls)
    assert calls[0] == calls[1] < calls[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "random, materialize", "blocks, factored"])
def test_compiled_layers_keep_products_and_no_weight(method: str) -> None:
    torch._dynamo.reset()
    model, plain = (prepared(wide(METHODS[method], **how)) for how in ({"compile": True, **ALL_BUT_PRODUCTS}, {}))
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    x, x_plain = (torch.linspace(-1, 1, TOKENS * 32).view(BATCH, LENGTH, 32).requires_grad_() for _ in range(2))
    cos, sin = model.model.rotary_emb(LENGTH, x.dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.model.layers[0](x, cos, sin)
    y.sin().sum().backward()
    plain.model.layers[0](x_plain, cos, sin).sin().sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-4, atol=1e-5)
    widths = [torch.Size(shape).numel() / TOKENS for shape in kept.values()]
    # x·Aᵀ, where layers that share their input have one.
    inner = [6, 6, 12, 18] if "factored" in method else []
    # The layer's input, q, o, attention's output; k, v; gate, up; a number for each head.
    assert sorted(widths) == sorted([*[32] * 4, 16, 16, 88, 88, 4, *inner])
