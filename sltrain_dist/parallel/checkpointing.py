"""What is done to the decoder layers before an engine shards them: activation checkpointing, then compilation.

Both replace a layer's `forward` and leave the module as it is, so that parameter names stay, and an engine's
hooks on the module run outside of them: its weights are gathered once for a recomputation and the backward
pass that follows it, and nothing of the engine is traced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sltrain_dist.config.schema import TrainConfig
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.sparse_lowrank.kept import KeptResults

_ATTENTION = frozenset(
    (
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    )
)
"""Fused attention on every device. Its unfused form is ordinary operations, and is computed again."""

_PRODUCTS = _ATTENTION | {torch.ops.aten.mm.default}
"""Dense and low-rank layers are `mm`. Batched products are unfused attention, whose scores must not be kept."""


def prepare_layers(model: LlamaForCausalLM, train: TrainConfig) -> None:
    """Applies `train.activation_checkpointing` and then `train.compile` to the model's decoder layers, in place."""
    for index, layer in enumerate(model.model.layers):
        checkpoint_layer(layer, index, train)
        if train.compile:
            layer.forward = torch.compile(layer.forward, fullgraph=True)


def checkpoint_layer(layer: nn.Module, index: int, train: TrainConfig) -> None:
    """Applies `train.activation_checkpointing` to one decoder layer, in place.

    Args:
        layer: The decoder layer.
        index: Its number in the model, from 0.
        train: Says whether and how its activations are computed again.
    """
    if not train.is_recomputed(index):
        return
    # Non-reentrant: its recomputation stops early, and hooks of FSDP2 and ZeRO see one backward pass.
    # Nothing in a layer is random, so that no state of random numbers need be kept.
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if train.keeps_products:
        how["context_fn"] = _keep_products
    elif train.keeps_attention:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    layer.forward = partial(checkpoint, layer.forward, **how)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _must_save(operation in _ATTENTION)


def _keep_products() -> Any:
    """The contexts of a forward pass and of its recomputation."""
    # torch.compile decides by operator, in a graph in which nothing is written in place. Outside of it, an operator
    # that writes in place cannot be kept, so that sparse plus low-rank layers are kept as a whole.
    if torch.compiler.is_compiling():
        return create_selective_checkpoint_contexts(_keep_traced_products)
    return KeptResults.pair(_PRODUCTS)


def _keep_traced_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation is torch.ops.aten.addmm.default:
        # x·Aᵀ is narrower than x, and W = B·A is wider than B: of the results of scaled products, W is not kept.
        return _must_save(context.op_output.numel() <= args[1].numel())
    # A path's last product is added in place to the sparse one's.
    return _must_save(operation in _PRODUCTS or operation is torch.ops.aten.addmm_.default)


def _must_save(kept: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
