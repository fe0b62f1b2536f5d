"""The algorithm of the published code's model as eager torch modules, to be recorded.

Written from what arXiv 2406.02214 and 2403.03507 (GaLore, on whose training script it builds) describe, with Hugging
Face's LLaMA and torch's unfused attention as they were then. The layers of full and galore are dense.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sltrain_dist.config.schema import Config, ModelConfig, ReparamConfig
from sltrain_dist.memory import record
from sltrain_dist.memory.recording import Recording
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.sparse_lowrank.sizes import nonzeros

BF16 = torch.bfloat16


def record_layer(config: Config, device: DeviceType) -> Recording:
    """Records a decoder layer."""
    return record.record_layer(config, None, device, PublishedLlama)


def record_ends(config: Config, device: DeviceType) -> Recording:
    """Records what is before and after the layers."""
    return record.record_ends(config, device, PublishedLlama)


class PublishedLlama(nn.Module):
    """LLaMA in eager mode, with modules named as in models/llama.py."""

    autocast = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = _Decoder(config)
        self.lm_head = _Head(config.model.hidden_size, config.model.vocab_size, bias=False, dtype=BF16)

    def forward(self, input_ids: Tensor, labels: Tensor, positions: None = None) -> Tensor:
        """Mean loss of (batch, length) ids, int64."""
        loss: Tensor = self.lm_head(self.model(input_ids), labels)
        return loss


class _Head(nn.Linear):
    """All logits at once, and the loss of a shifted copy of them."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        logits = super().forward(x)
        shifted = logits[..., :-1, :].contiguous()
        return F.cross_entropy(shifted.view(-1, self.out_features), labels[..., 1:].contiguous().view(-1))


class _Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size, dtype=BF16)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(model.num_layers))
        self.norm = _Norm(model)
        self.rotary_emb = _RotaryTable(config.data.seq_len, model.head_dim)
        if config.train.activation_checkpointing == "full":
            for layer in self.layers:
                # Reentrant, as in Hugging Face's gradient_checkpointing then. Nothing in a layer is random.
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=True, preserve_rng_state=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, length = input_ids.shape
        x = self.embed_tokens(input_ids)
        mask = x.new_zeros(batch, 1, length, length)  # causal and padding; given to all layers, and not used
        for layer in self.layers:
            x = layer(x, *self.rotary_emb(length), mask)
        out: Tensor = self.norm(x)
        return out


class _RotaryTable(nn.Module):
    """Cosines and sines by position. In the published code every layer has a copy, of a megabyte at 7B."""

    cos: Tensor
    sin: Tensor

    def __init__(self, length: int, head_dim: int) -> None:
        super().__init__()
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(length, head_dim, dtype=BF16))

    def forward(self, length: int, *_: Any) -> tuple[Tensor, Tensor]:
        return self.cos[:length], self.sin[:length]


class _Norm(nn.Module):
    """LlamaRMSNorm: the square in float32, and the bf16 input times a float32 root."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.hidden_size, dtype=BF16))
        self.eps = model.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype)


class _Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = _Norm(config.model)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _Norm(config.model)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Attention(nn.Module):
    """Causal attention without a fused kernel: torch's scaled_dot_product_attention with the math backend alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, self.head_dim = config.model.hidden_size, config.model.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (_linear(width, width, config) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class _Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width, inner = config.model.hidden_size, config.model.intermediate_size
        self.gate_proj, self.up_proj = _linear(width, inner, config), _linear(width, inner, config)
        self.down_proj = _linear(inner, width, config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def _linear(in_features: int, out_features: int, config: Config) -> nn.Module:
    if config.reparam.method != "sltrain":
        return nn.Linear(in_features, out_features, bias=False, dtype=BF16)
    return _SparseLowRank(in_features, out_features, config.reparam)


class _SparseLowRank(nn.Module):
    """W = BA·alpha/r + S. A is scaled before the autograd function, which therefore keeps the scaled copy."""

    def __init__(self, in_features: int, out_features: int, reparam: ReparamConfig) -> None:
        super().__init__()
        count = nonzeros(out_features, in_features, reparam.density)
        self.B = nn.Parameter(torch.empty(out_features, reparam.rank, dtype=BF16))
        self.A = nn.Parameter(torch.empty(reparam.rank, in_features, dtype=BF16))
        self.V = nn.Parameter(torch.empty(count, dtype=BF16))
        self.support = nn.Module()
        self.support.register_buffer("positions", torch.empty(count, dtype=torch.int64))  # torch.randperm's type
        self.scaled = _Scaled(reparam.alpha / reparam.rank)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _BuildWhole.apply(x, self.B, self.scaled(self.A), self.V, self.support.positions)
        return y


class _Scaled(nn.Module):
    component = "activations.scaled factors"

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, A: Tensor) -> Tensor:
        return A * self.scale


class _BuildWhole(torch.autograd.Function):
    """Builds W whole in both passes; the backward pass takes dB, dA and dV from a dense gradient."""

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
