"""Activation checkpointing and compilation of blocks: same numbers, less kept, one trace."""

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
from sltrain_dist.parallel.blocks import prepare_blocks

FULL = {"activation_checkpointing": "full"}
EVERY_SECOND = {"activation_checkpointing": "selective"}
ALL_BUT_ATTENTION = {"activation_checkpointing": "selective", "checkpoint_policy": "attention"}


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
        prepare_blocks(model, settings.train)
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


@pytest.mark.parametrize("support", ["random", "stratified", "blocks"])
@pytest.mark.parametrize(
    "train",
    [FULL, EVERY_SECOND, ALL_BUT_ATTENTION, {"compile": True}, {"compile": True, **FULL}],
    ids=["full", "every second", "all but attention", "compiled", "compiled and full"],
)
def test_same_loss_and_gradients(support: str, train: dict[str, Any]) -> None:
    plain, changed = prepared(config(support)), prepared(config(support, **train))
    losses = [loss_of(model) for model in (plain, changed)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, want), (other, got) in zip(plain.named_parameters(), changed.named_parameters(), strict=True):
        assert name == other  # no wrapper has changed it
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


@pytest.mark.parametrize(("train", "calls"), [({}, 4), (ALL_BUT_ATTENTION, 4), (EVERY_SECOND, 6), (FULL, 8)])
def test_attention_is_computed_again_only_where_it_should_be(train: dict[str, Any], calls: int) -> None:
    model = prepared(config(**train))
    with Calls() as counted:
        loss_of(model).backward()
    assert counted.attention == calls


@pytest.mark.parametrize(
    ("support", "path"),
    [("random", "materialize"), ("stratified", "factored"), ("blocks", "materialize"), ("blocks", "factored")],
)
def test_compiled_blocks_share_a_trace(support: str, path: str) -> None:
    """Every block is the same code: with one trace each, a model of many blocks would hit torch's limit."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = build_config(merged(config(support, layers=9, compile=True).model_dump(), {"reparam": {"path": path}}))
    loss_of(prepared(settings)).backward()
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
