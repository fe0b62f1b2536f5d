"""The LLaMA decoder. Modules are named as in Hugging Face's LLaMA, so that an export is a rename."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltrain_dist.config.schema import ModelConfig
from sltrain_dist.models.elementwise import rms_norm, rotate
from sltrain_dist.models.kv_cache import KVCache
from sltrain_dist.models.loss import chunked_cross_entropy_sum, cross_entropy_sum
from sltrain_dist.numerics.int8_weight import dequantized
from sltrain_dist.numerics.keyed import Initial
from sltrain_dist.sparse_lowrank.layer import apply_shared

LinearFactory = Callable[[int, int, str], nn.Module]
"""Creates a linear layer from (in_features, out_features, name)."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Returns the attention of rotated queries and keys, and values, each (batch, heads, length, head_dim)."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def initial_values(self) -> dict[str, Initial]:
        """The gain starts at 1."""
        return {"weight": Initial.constant(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., size) to (..., size)."""
        # Under mixed precision, an engine may gather the gain in a type other than x's.
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Embedding(nn.Embedding):
    """Token embedding whose initial values are keyed by its name."""

    def __init__(self, vocab_size: int, size: int, *, name: str, seed: int, std: float) -> None:
        self._initial = Initial.normal(std, seed, f"{name}.weight")
        super().__init__(vocab_size, size)

    def initial_values(self) -> dict[str, Initial]:
        """The weight starts from N(0, std²)."""
        return {"weight": self._initial}

    def reset_parameters(self) -> None:
        """Sets the initial values, in place."""
        self._initial.fill_(self.weight)


class DenseLinear(nn.Linear):
    """A bias-free dense layer whose initial values are keyed by its name."""

    def __init__(self, in_features: int, out_features: int, *, name: str, seed: int, std: float) -> None:
        self._initial = Initial.normal(std, seed, f"{name}.weight")
        super().__init__(in_features, out_features, bias=False)

    def initial_values(self) -> dict[str, Initial]:
        """The weight starts from N(0, std²)."""
        return {"weight": self._initial}

    def reset_parameters(self) -> None:
        """Sets the initial values, in place."""
        self._initial.fill_(self.weight)


class Head(DenseLinear):
    """The language-model head. It computes the loss too, because engines gather its weight only while it is called.

    Args:
        in_features: Size of the hidden states.
        out_features: Size of the vocabulary.
        name: Keys the initial values, with `seed`.
        seed: Keys the initial values.
        std: Standard deviation of the initial values.
        chunk_tokens: Number of tokens whose logits exist at a time in the loss; 0 for all at once.
    """

    def __init__(
        self, in_features: int, out_features: int, *, name: str, seed: int, std: float, chunk_tokens: int
    ) -> None:
        super().__init__(in_features, out_features, name=name, seed=seed, std=std)
        self.chunk_tokens = chunk_tokens

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns logits (..., vocabulary) of hidden states (..., hidden); with labels (...), the summed loss."""
        if labels is not None and self.chunk_tokens:
            return chunked_cross_entropy_sum(x, self.weight, labels, self.chunk_tokens)
        logits = F.linear(x, dequantized(self.weight))
        return logits if labels is None else cross_entropy_sum(logits, labels)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding (arXiv 2104.09864), in float32.

    They are computed, and not in the state dict. A sequence longer than `length` is an error.

    Args:
        head_dim: Width of one attention head; even.
        theta: Base of the frequencies.
        length: Number of positions in the table.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, theta: float, length: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.length = head_dim, theta, length
        self.register_buffer("cos", torch.empty(length, head_dim), persistent=False)
        self.register_buffer("sin", torch.empty(length, head_dim), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Computes the table, on its device."""
        if self.cos.is_meta:
            return
        with torch.no_grad():
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
            angles = torch.outer(torch.arange(self.length, dtype=torch.float32), self.theta**-exponents)
            angles = torch.cat((angles, angles), dim=-1)
            self.cos.copy_(angles.cos())
            self.sin.copy_(angles.sin())

    def forward(self, length: int, dtype: torch.dtype, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (cos, sin) of type `dtype`, each (length, head_dim), or (batch, 1, length, head_dim) at `positions`.

        Args:
            length: Length of the sequences.
            dtype: Type of the result.
            positions: (batch, length), int64, below the table's length. None: 0, 1, … in every sequence.

        Raises:
            ValueError: The sequences are longer than the table.
        """
        if length > self.length:
            raise ValueError(f"a sequence of {length} tokens is longer than the model was built for: {self.length}")
        if positions is None:
            return self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        cos, sin = self.cos.to(dtype)[positions], self.sin.to(dtype)[positions]
        return cos[:, None], sin[:, None]


def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an attention mask by which a token attends to itself and to earlier tokens of its document in the row.

    One mask serves all layers and heads. It is additive, as the attention kernels take it: from a boolean mask, every
    layer would make an additive one and save it for the backward pass.

    Args:
        positions: (batch, length), int64: each token's position in its document, from 0 or from the row's start.
        dtype: Type that attention computes in.

    Returns:
        (batch, 1, length, length): 0 where a query (third dimension) attends to a key (fourth), elsewhere −∞.
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    first = (index - positions)[:, :, None]
    hidden = (index > index[:, None]) | (index < first)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None]


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config: ModelConfig, linear: LinearFactory, name: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.kv_heads != config.num_heads
        kv_size = config.kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, config.hidden_size, f"{name}.q_proj")
        self.k_proj = linear(config.hidden_size, kv_size, f"{name}.k_proj")
        self.v_proj = linear(config.hidden_size, kv_size, f"{name}.v_proj")
        self.o_proj = linear(config.hidden_size, config.hidden_size, f"{name}.o_proj")

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Maps (batch, length, hidden) to the same shape. A position attends to itself and to all earlier ones.

        `mask`, if given, says which positions it attends to instead; see :func:`document_mask`. `attend`, if given,
        computes the attention, also over tokens that are not in x; see :class:`KVCache`.
        """
        batch, length, _ = x.shape
        q, k, v = (
            y.view(batch, length, -1, self.head_dim).transpose(1, 2)
            for y in apply_shared((self.q_proj, self.k_proj, self.v_proj), x)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self._attend(q, k, v, mask) if attend is None else attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the attention among the tokens of x alone, as in training."""
        if mask is not None and self.grouped:
            # CUDA has no fused attention for grouped heads with a mask; the unfused one takes length² values per head.
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        grouped = self.grouped and mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class MLP(nn.Module):
    """The SwiGLU feed-forward network (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, linear: LinearFactory, name: str) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, f"{name}.gate_proj")
        self.up_proj = linear(config.hidden_size, config.intermediate_size, f"{name}.up_proj")
        self.down_proj = linear(config.intermediate_size, config.hidden_size, f"{name}.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., hidden) to (..., hidden)."""
        gate, up = apply_shared((self.gate_proj, self.up_proj), x)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, linear: LinearFactory, name: str) -> None:
        super().__init__()
        self.self_attn = Attention(config, linear, f"{name}.self_attn")
        self.mlp = MLP(config, linear, f"{name}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Maps (batch, length, hidden) to the same shape; `mask` and `attend` as of :class:`Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """The embedding, the decoder layers and the final norm."""

    def __init__(self, config: ModelConfig, linears: Sequence[LinearFactory], seq_len: int, seed: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, name="model.embed_tokens", seed=seed, std=config.init_std
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, linear, f"model.layers.{i}") for i, linear in enumerate(linears)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_theta, seq_len)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Maps token ids (batch, length) to hidden states (batch, length, hidden)."""
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(input_ids.shape[1], x.dtype, positions if cache is None else cache.positions)
        if cache is not None:
            for number, layer in enumerate(self.layers):
                x = layer(x, cos, sin, attend=partial(cache.attend, number))
            return self.norm(x)
        mask = None
        if positions is not None:
            device = x.device.type
            mask = document_mask(
                positions, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            )
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """The decoder with its language-model head.

    Args:
        config: Shape of the model.
        linears: For each decoder layer, creates its linear layers of attention and MLP.
        seq_len: Longest sequence, in tokens.
        seed: Keys the initial values.
        autocast: Type of matrix products, if it is not the parameters' type.
        chunk_tokens: Number of tokens whose logits exist at a time in the loss; 0 for all at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        linears: Sequence[LinearFactory],
        seq_len: int,
        seed: int,
        autocast: torch.dtype | None = None,
        chunk_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.autocast = config, autocast
        self.model = LlamaModel(config, linears, seq_len, seed)
        self.lm_head = Head(
            config.hidden_size,
            config.vocab_size,
            name="lm_head",
            seed=seed,
            std=config.init_std,
            chunk_tokens=chunk_tokens,
        )
        self.tie()

    def tie(self) -> None:
        """Makes the head and the embedding one parameter if the configuration says so; `to_empty` undoes it."""
        if self.config.tie_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        at: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Predicts the next token at every position, or at one position of each row.

        Args:
            input_ids: (batch, length), int64.
            labels: (batch, length), int64: the token after each position (already shifted), or `loss.IGNORE` where
                nothing is predicted.
            positions: (batch, length), int64: each token's position in its document, if several documents share a row;
                see :func:`document_mask`. None: a row is one document.
            at: (batch,), int64: the only position of each row whose logits are computed. Not with labels.
            cache: Keys and values of earlier tokens, to which those of these tokens are added. Not with positions.

        Returns:
            Logits (batch, length, vocabulary) without labels, or (batch, vocabulary) with `at`; with labels, the summed
            loss, a float32 scalar.
        """
        # Not around the call: DeepSpeed disables a caller's autocast, and every engine must compute alike.
        with torch.autocast(input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            hidden = self.model(input_ids, positions, cache)
            if at is not None:
                hidden = hidden[torch.arange(len(at), device=at.device), at]
            return self.lm_head(hidden, labels)
