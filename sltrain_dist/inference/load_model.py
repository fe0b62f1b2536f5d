"""Loading of a checkpoint's weights for inference, layer by layer, in factored or in merged form."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.models.build import build_meta_model, join_fingerprints
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.numerics.int8_weight import plain
from sltrain_dist.sparse_lowrank.layer import LowRankLinear, SLLinear

Form = Literal["factored", "merged"]
"""factored: linear layers keep B, A and V. merged: each is one dense weight, W = scale·BA + S."""


def load_model(
    reader: CheckpointReader, form: Form, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LlamaForCausalLM:
    """Loads a model without gradients, one layer at a time, so that little more than the result is ever in memory.

    Args:
        reader: The checkpoint.
        form: Form of the linear layers of attention and MLP. Products are computed in float32 before they are rounded.
        dtype: Type of the weights, and of all that is computed. None: the type of the parameters in training.
        device: Device of the model.

    Raises:
        CheckpointError: A tensor is missing, or this version draws other supports from the checkpoint's seed.
    """
    config = reader.config()
    model = build_meta_model(config)
    dtype = dtype or getattr(torch, config.train.precision.parameter)
    supports: list[tuple[str, str]] = []
    for name, module in list(model.named_modules()):
        if not list(module.parameters(recurse=False)) or (config.model.tie_head and module is model.lm_head):
            continue
        reader.fill(module, name)
        if isinstance(module, SLLinear):
            supports.append((module.name, module.support.fingerprint()))
        if isinstance(module, SLLinear | LowRankLinear) and form == "merged":
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, dense_layer(module.dense_weight().to(device, dtype)))
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):  # also the values of int8 weights
            module.register_parameter(key, nn.Parameter(plain(parameter.detach(), torch.float32), requires_grad=False))
        module.to(device, dtype)
    reader.check_supports(join_fingerprints(supports))
    model.model.rotary_emb.to_empty(device=device)
    model.model.rotary_emb.reset_parameters()
    model.tie()
    model.autocast = None
    return model.requires_grad_(False)


def dense_layer(weight: Tensor) -> nn.Linear:
    """Returns a layer without a bias that has this weight (m, n), not a copy of it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
