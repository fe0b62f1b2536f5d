"""Floating-point operations that are really done (no torch): by the paths that layers take, recomputation included."""

from __future__ import annotations

from functools import lru_cache

from sltrain_dist.config.rules import passes_twice
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.block import Block
from sltrain_dist.memory.operands import Linear
from sltrain_dist.memory.sizes import Sizes


def flops_per_token(config: Config, sizes: Sizes) -> int:
    """Two for a multiply-add of matrix products and attention, forward and backward; elementwise work is left out."""
    return 2 * _multiply_adds(sizes) * (2 if passes_twice(config.optim) else 1) // sizes.ends.tokens


@lru_cache(4096)
def _multiply_adds(sizes: Sizes) -> int:
    """Of one micro-batch, forward and backward."""
    tokens = sizes.ends.tokens
    total = 3 * tokens * sizes.ends.vocabulary * sizes.ends.hidden
    for kind in sizes.order:
        block = sizes.blocks[kind]
        forward = sum(_linear_forward(linear, tokens) for linear in block.linears)
        attention = _attention_forward(block)
        backward = sum(_linear_backward(linear, tokens) for linear in block.linears)
        total += forward + backward + attention + 5 * attention // 2
        if block.recompute != "nothing":
            total += forward + (attention if block.recompute == "all" else 0)
    return total


def _attention_forward(block: Block) -> int:
    """Multiply-adds of the causal half of QKᵀ and of its product with V; the backward pass takes 2.5 times as many
    (FlashAttention-2, arXiv 2307.08691, section 4.1: five products for two)."""
    return block.batch * block.heads * block.length * block.length * block.head_dim


def _linear_forward(layer: Linear, tokens: int) -> int:
    """Multiply-adds; docs/operator.md has the formulas."""
    m, n, r = layer.m, layer.n, layer.rank
    if not r:
        return tokens * m * n
    if not layer.nnz or layer.plan.path == "factored":
        return tokens * (r * (m + n) + layer.nnz)
    return tokens * m * n + m * n * r


def _linear_backward(layer: Linear, tokens: int) -> int:
    m, n, r = layer.m, layer.n, layer.rank
    if layer.nnz and layer.plan.dense_backward:
        return 2 * tokens * m * n + 3 * m * n * r  # W again, and dB and dA from the dense gradient
    again = tokens * r * n if layer.nnz and layer.plan.path == "materialize" else 0  # h, which was not formed
    return 2 * _linear_forward_factored(layer, tokens) + again


def _linear_forward_factored(layer: Linear, tokens: int) -> int:
    m, n, r = layer.m, layer.n, layer.rank
    return tokens * (r * (m + n) + layer.nnz) if r else tokens * m * n
