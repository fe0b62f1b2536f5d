"""Activation checkpointing and compilation of the decoder layers, before an engine shards them.

Both replace only the `forward` method of a layer, so that parameter names do not change and the engine's module
hooks run outside of it: weights are gathered once for the recomputation and the backward pass that follows, and no
engine code is traced.
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
"""Fused attention on every device. Unfused attention consists of ordinary operations and is recomputed."""

_PRODUCTS = _ATTENTION | {torch.ops.aten.mm.default}
"""Fused attention, and `mm` of dense and low-rank layers. Batched products are the scores of unfused attention."""


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
        index: Index of the layer in the model.
        train: Whether and how its activations are recomputed.
    """
    if not train.is_recomputed(index):
        return
    # Non-reentrant: recomputation can stop early, and hooks of FSDP2 and ZeRO see a single backward pass.
    # Layers use no random numbers, so that the generator's state need not be saved.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if train.keeps_products:
        options["context_fn"] = _keep_products
    elif train.keeps_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    layer.forward = partial(checkpoint, layer.forward, **options)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _must_save(operation in _ATTENTION)


def _keep_products() -> Any:
    """Returns the contexts of a forward pass and of its recomputation."""
    # torch.compile applies the policy per operator, to a graph without in-place operations. In eager mode, results of
    # in-place operators cannot be kept; there the outputs of sparse plus low-rank layers are kept as a whole.
    if torch.compiler.is_compiling():
        return create_selective_checkpoint_contexts(_keep_traced_products)
    return KeptResults.pair(_PRODUCTS)


def _keep_traced_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation is torch.ops.aten.addmm.default:
        # Keep x·Aᵀ, which is smaller than x, but not W = B·A, which is larger than B.
        return _must_save(context.op_output.numel() <= args[1].numel())
    # The last product of a layer is added in place to the sparse product.
    return _must_save(operation in _PRODUCTS or operation is torch.ops.aten.addmm_.default)


def _must_save(kept: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
