"""Parameter and FLOP counts in closed form (no torch), shared by the model, the run summary and the planner."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from sltrain_dist.config.schema import PROJECTED_METHODS, ModelConfig, ReparamConfig
from sltrain_dist.numerics.int8_layout import int8_bytes
from sltrain_dist.sparse_lowrank.sizes import nonzeros, values_shape

_DENSE_METHODS = ("full", *PROJECTED_METHODS)
_REPLACED = re.compile(r"(?:^|\.)(self_attn|mlp)\.[a-z]+_proj\.")

NamedShape = tuple[str, tuple[int, ...]]
"""Name and shape of a parameter."""


@dataclass(frozen=True)
class LinearShape:
    """A replaced linear layer: its name inside a decoder layer, m = out_features and n = in_features.

    `sharing` layers, itself included, are applied to one input at once.
    """

    name: str
    m: int
    n: int
    sharing: int


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by kind."""

    embedding: int
    head: int
    norms: int
    factors: int
    """B and A of all replaced layers."""
    sparse: int
    """V of all replaced layers."""
    dense: int
    """Dense weights of attention and MLP: of `reparam.dense_layers`, or of all layers with full, relora, galore and
    apollo."""

    @property
    def remainder(self) -> int:
        """Parameters that are never replaced: embedding, head and norms ("base" in the paper's accounting)."""
        return self.embedding + self.head + self.norms

    @property
    def total(self) -> int:
        """All parameters."""
        return self.remainder + self.factors + self.sparse + self.dense


@lru_cache(maxsize=64)
def block_linears(model: ModelConfig) -> tuple[LinearShape, ...]:
    """Returns the linear layers of one decoder layer, in the order of the forward pass."""
    h, f, kv = model.hidden_size, model.intermediate_size, model.kv_heads * model.head_dim
    return (
        LinearShape("self_attn.q_proj", h, h, 3),
        LinearShape("self_attn.k_proj", kv, h, 3),
        LinearShape("self_attn.v_proj", kv, h, 3),
        LinearShape("self_attn.o_proj", h, h, 1),
        LinearShape("mlp.gate_proj", f, h, 2),
        LinearShape("mlp.up_proj", f, h, 2),
        LinearShape("mlp.down_proj", h, f, 1),
    )


def count_parameters(model: ModelConfig, reparam: ReparamConfig) -> ParameterCount:
    """Counts the parameters of a model (the paper's `base + LR + SP`, or `F` with method full).

    relora has both the frozen dense weights and the factors; galore and apollo have the parameters of the full model.
    """
    h, layers, linears = model.hidden_size, model.num_layers, block_linears(model)
    replaced = layers - len(reparam.dense_layers)
    factored, dense = reparam.method not in _DENSE_METHODS, reparam.method in (*_DENSE_METHODS, "relora")
    return ParameterCount(
        embedding=model.vocab_size * h,
        head=0 if model.tie_head else model.vocab_size * h,
        norms=(2 * layers + 1) * h,
        factors=replaced * sum(reparam.rank * (s.m + s.n) for s in linears) if factored else 0,
        sparse=replaced * sum(nonzeros(s.m, s.n, reparam.density, reparam.support) for s in linears)
        if reparam.method == "sltrain"
        else 0,
        dense=(layers if dense else layers - replaced) * sum(s.m * s.n for s in linears),
    )


def parameter_shapes(model: ModelConfig, reparam: ReparamConfig) -> list[NamedShape]:
    """Returns (name, shape) of every parameter, in the order of the built model's `named_parameters()`."""
    h = model.hidden_size
    shapes: list[NamedShape] = [("model.embed_tokens.weight", (model.vocab_size, h))]
    for layer in range(model.num_layers):
        prefix, method = f"model.layers.{layer}", reparam.method_of(layer, model.num_layers)
        for linear in block_linears(model):
            name, m, n = f"{prefix}.{linear.name}", linear.m, linear.n
            if method in (*_DENSE_METHODS, "relora"):
                shapes.append((f"{name}.weight", (m, n)))
            if method in _DENSE_METHODS:
                continue
            shapes += [(f"{name}.B", (m, reparam.rank)), (f"{name}.A", (reparam.rank, n))]
            if method == "sltrain":
                shapes.append((f"{name}.V", values_shape(m, n, reparam.density, reparam.support)))
        shapes += [(f"{prefix}.{norm}.weight", (h,)) for norm in ("input_layernorm", "post_attention_layernorm")]
    shapes.append(("model.norm.weight", (h,)))
    if not model.tie_head:
        shapes.append(("lm_head.weight", (model.vocab_size, h)))
    return shapes


def is_factor(name: str) -> bool:
    """Whether a parameter belongs to a linear layer that SLTrain replaces, for any method.

    These are B, A, V or a dense weight of attention and MLP. The other parameters (embedding, head, norms) are the
    dense remainder, which `parallel.shard: factors` replicates on every rank.

    Args:
        name: The parameter's name in the model, or in its decoder layer.
    """
    return _REPLACED.search(name) is not None


def is_frozen(name: str, reparam: ReparamConfig) -> bool:
    """Whether a named parameter is not trained: the dense weights of relora, which restarts alone change."""
    return reparam.method == "relora" and is_factor(name) and name.endswith(".weight")


def trained_shapes(model: ModelConfig, reparam: ReparamConfig) -> list[NamedShape]:
    """Returns (name, shape) of every parameter that has a gradient, in the model's order."""
    return [(name, shape) for name, shape in parameter_shapes(model, reparam) if not is_frozen(name, reparam)]


def factor_pairs(model: ModelConfig, reparam: ReparamConfig) -> list[tuple[NamedShape, NamedShape]]:
    """Returns (name, shape) of B and of A of every linear layer that has a low-rank product, in the model's order."""
    shapes = dict(parameter_shapes(model, reparam))
    layers = [name.removesuffix(".B") for name in shapes if name.endswith(".B")]
    return [((f"{layer}.B", shapes[f"{layer}.B"]), (f"{layer}.A", shapes[f"{layer}.A"])) for layer in layers]


def is_int8(name: str, reparam: ReparamConfig) -> bool:
    """Returns whether `reparam.weight_bits` makes a named parameter an int8 weight: B, A, V and the head, but not the
    norms, nor the embedding (or a head tied to it), of which an update changes few rows."""
    return reparam.weight_bits == 8 and (name == "lm_head.weight" or name.rpartition(".")[2] in ("B", "A", "V"))


def parameter_bytes(name: str, shape: tuple[int, ...], reparam: ReparamConfig, value_bytes: int) -> int:
    """Returns the bytes of a named parameter; if it is not an int8 weight, each value takes `value_bytes`."""
    return int8_bytes(shape) if is_int8(name, reparam) else value_bytes * math.prod(shape)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Returns the floating-point operations per token of the *equivalent dense* model, forward plus backward.

    The numerator of model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): 6 per weight of the linear layers and
    the head, plus 12 · layers · width · sequence for attention. It does not depend on how W is applied, so that the MFU
    of two methods compares like their tokens/s.
    """
    weights = model.num_layers * sum(s.m * s.n for s in block_linears(model)) + model.vocab_size * model.hidden_size
    return 6 * weights + 12 * model.num_layers * model.hidden_size * seq_len
