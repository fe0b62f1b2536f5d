"""The algorithm of the published code in the modules of models/llama.py, so that it can be recorded.

It follows arXiv 2406.02214 and 2403.03507 (GaLore, whose training script the published code builds on), with the LLaMA
of Hugging Face and the unfused attention of torch at that time. The layers of full and galore are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sltrain_dist.config.schema import Config
from sltrain_dist.memory import record
from sltrain_dist.memory.recording import Recording
from sltrain_dist.models.build import sparse_layers
from sltrain_dist.models.llama import MLP, Attention, Head, LlamaForCausalLM, LlamaModel, RMSNorm
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.sparse_lowrank.layer import SLLinear


def record_layer(config: Config, device: DeviceType) -> Recording:
    """Records a decoder layer."""
    return record.record_layer(config, None, device, published_model)


def record_ends(config: Config, device: DeviceType) -> Recording:
    """Records the parts before and after the decoder layers."""
    return record.record_ends(config, device, published_model)


def published_model(config: Config) -> LlamaForCausalLM:
    """Builds the published model with fake parameters; needs FakeTensorMode."""
    method = "sltrain" if config.reparam.method == "sltrain" else "full"
    reparam = config.reparam.model_copy(update={"method": method})
    return as_published(record.fake_model(config.model_copy(update={"reparam": reparam})), config)


def as_published(model: LlamaForCausalLM, config: Config) -> LlamaForCausalLM:
    """Makes a model of this code compute as the published code does, in place; sparse positions are left empty.

    With labels (batch, length), which are the token ids themselves, the model returns the mean loss.
    """
    for name, table in list(model.model.rotary_emb.named_buffers()):
        # In the published code every layer has a copy of these tables, a megabyte for 7B.
        model.model.rotary_emb.register_buffer(name, table.to(model.lm_head.weight.dtype))
    for module in model.modules():
        if type(module) in _FORWARD:
            module.forward = partial(_FORWARD[type(module)], module)
    for _, layer in sparse_layers(model):
        layer.support = nn.Module()  # type: ignore[assignment]
        layer.support.register_buffer("positions", torch.empty(layer.V.shape, dtype=torch.int64))  # as torch.randperm's
        layer.scaled = _Scaled(layer.scale)
    if config.train.activation_checkpointing == "full":
        for decoder in model.model.layers:
            # Reentrant, as Hugging Face's gradient_checkpointing was. Nothing in a layer is random.
            decoder.forward = partial(checkpoint, decoder.forward, use_reentrant=True, preserve_rng_state=False)
    return model


def _decoder(self: LlamaModel, input_ids: Tensor, positions: None = None, cache: None = None) -> Tensor:
    batch, length = input_ids.shape
    x = self.embed_tokens(input_ids)
    mask = x.new_zeros(batch, 1, length, length)  # causal and padding mask; passed to all layers, which do not use it
    for layer in self.layers:
        x = layer(x, *self.rotary_emb(length, x.dtype), mask)
    return self.norm(x)


def _norm(self: RMSNorm, x: Tensor) -> Tensor:
    """Computes LlamaRMSNorm: mean square in float32, then the bf16 input times the float32 inverse root."""
    mean_square = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype)


def _attention(
    self: Attention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, attend: None = None
) -> Tensor:
    """Computes causal attention unfused, as torch's scaled_dot_product_attention does with the math backend."""
    batch, length, width = x.shape
    q, k, v = (
        project(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    positions = torch.arange(length)[None]
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    q, k = (each * cos + _rotate_half(each) * sin for each in (q, k))
    scale = self.head_dim**-0.25
    pairs = (q * scale) @ (k.transpose(-2, -1) * scale)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    pairs.add_(torch.zeros_like(allowed, dtype=x.dtype).masked_fill_(~allowed, float("-inf")))
    mixed = pairs.softmax(-1) @ v
    return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _mlp(self: MLP, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _head(self: Head, x: Tensor, labels: Tensor) -> Tensor:
    """Computes all logits at once, and the loss from a shifted copy of them."""
    logits = F.linear(x, self.weight)
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, self.out_features), labels[..., 1:].contiguous().view(-1))


def _sparse_low_rank(self: SLLinear, x: Tensor) -> Tensor:
    """Applies W = BA·alpha/r + S. A is scaled before the autograd function, which therefore saves the scaled copy."""
    scaled: _Scaled = self.scaled  # type: ignore[assignment]
    return _BuildWhole.apply(x, self.B, scaled(self.A), self.V, self.support.positions)


_FORWARD: dict[type[nn.Module], Callable[..., Tensor]] = {
    LlamaModel: _decoder,
    RMSNorm: _norm,
    Attention: _attention,
    MLP: _mlp,
    Head: _head,
    SLLinear: _sparse_low_rank,
}
"""Forward passes of the published code, by the class of the module whose forward pass they replace."""


class _Scaled(nn.Module):
    component = "activations.scaled factors"

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, A: Tensor) -> Tensor:
        return A * self.scale


class _BuildWhole(torch.autograd.Function):
    """A linear layer that builds W in both passes; dB, dA and dV are computed from a dense gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, A: Tensor, V: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(x, B, A, V, positions)
        return F.linear(x, _build(B, A, V, positions))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, V, positions = ctx.saved_tensors
        W = _build(B, A, V, positions)
        dx = grads[0] @ W
        G = grads[0].flatten(0, 1).t() @ x.flatten(0, 1)
        return dx, G @ A.t(), B.t() @ G, G.flatten()[positions], None


def _build(B: Tensor, A: Tensor, V: Tensor, positions: Tensor) -> Tensor:
    W = B @ A
    W.view(-1).index_add_(0, positions, V)
    return W
