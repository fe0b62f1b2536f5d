"""Loading of a checkpoint's weights for inference, layer by layer, in factored or in merged form."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.inference.decoding_linear import DecodingLinear
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
        for key, parameter in list(module.named_parameters(recurse=False)):  # also the values of int8 weights
            module.register_parameter(key, nn.Parameter(plain(parameter.detach(), torch.float32), requires_grad=False))
        if form == "merged":
            model.set_submodule(name, in_form(module, form).to(device, dtype))
        else:
            model.set_submodule(name, in_form(module.to(device, dtype), form))
    reader.check_supports(join_fingerprints(supports))
    model.model.rotary_emb.to_empty(device=device)
    model.model.rotary_emb.reset_parameters()
    model.tie()
    model.autocast = None
    return model.requires_grad_(False)


def set_form(model: nn.Module, form: Form) -> None:
    """Brings the linear layers of a model into a form for inference, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SLLinear | LowRankLinear):
            model.set_submodule(name, in_form(module, form))


def in_form(layer: nn.Module, form: Form) -> nn.Module:
    """Returns a layer that computes the same in a form for inference; `layer` itself if it has nothing to change."""
    if form == "merged" and isinstance(layer, SLLinear | LowRankLinear):
        weight = layer.dense_weight()
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        return dense
    return DecodingLinear(layer) if form == "factored" and isinstance(layer, SLLinear) else layer
