"""What is done to the decoder blocks before an engine shards them: activation checkpointing, then compilation.

Both replace a block's `forward` and leave the module as it is, so that parameter names stay, and an engine's
hooks on the module run outside of them: its weights are gathered once for a recomputation and the backward
pass that follows it, and nothing of the engine is traced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sltrain_dist.config.rules import is_recomputed, keeps_attention
from sltrain_dist.config.schema import TrainConfig
from sltrain_dist.models.llama import LlamaForCausalLM

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


def prepare_blocks(model: LlamaForCausalLM, train: TrainConfig) -> None:
    """Applies `train.activation_checkpointing` and then `train.compile` to the model's blocks, in place."""
    for index, block in enumerate(model.model.layers):
        if is_recomputed(index, train):
            # Non-reentrant: its recomputation stops early, and hooks of FSDP2 and ZeRO see one backward pass.
            # Nothing in a block is random, so that no state of random numbers need be kept.
            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if keeps_attention(train):
                how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
            block.forward = partial(checkpoint, block.forward, **how)
        if train.compile:
            block.forward = torch.compile(block.forward, fullgraph=True)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
