"""Fake tensors of the CPU in the place of a GPU's: the code takes the paths that it takes on CUDA.

torch's CPU builds cannot differentiate fake CUDA tensors, and a planner must not need a GPU. Where an operator is
another one on CUDA, its place is taken by one that makes and keeps the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sltrain_dist.config.schema import Config
from sltrain_dist.models import llama
from sltrain_dist.optim import low_bit
from sltrain_dist.sparse_lowrank import blocks, cost, functional, kernels


@contextmanager
def as_cuda(config: Config) -> Iterator[None]:
    """Lets the code that runs in the block, on fake tensors, do as on CUDA.

    Args:
        config: The run.
    """

    def plan(*args: Any, **kwargs: Any) -> Any:
        return cost.choose_plan(*args, **{**kwargs, "device": "cuda"})

    with ExitStack() as stack:
        for owner, name, value in (
            (functional, "choose_plan", plan),
            (kernels, "DEVICES", ["cpu"]),
            (kernels, "HAVE_TRITON", True),
            (blocks, "by_features", lambda x: False),
            (low_bit, "_SPAN_CPU", low_bit._SPAN),
            (llama, "rms_norm", _RMSNorm.apply),
            # On a GPU torch's SGD takes all parameters together.
            (import_module("torch.optim.sgd"), "_default_to_fused_or_foreach", lambda *_, **__: (False, True)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        model = config.model
        if config.train.dtype == "fp32" and model.kv_heads != model.num_heads and not config.data.reset_attention:
            # Flash attention takes no float32, and the memory-efficient kernel no grouped heads (torch's sdp_utils).
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


class _RMSNorm(torch.autograd.Function):
    """CUDA's fused kernel: keeps the input, the gain, and a float32 a row (torch's _fused_rms_norm)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(gain), None


def _flash_backward(grad: Tensor, query: Tensor, *rest: Any, **kwargs: Any) -> int:
    """Query gradients and a row's sum are in float32 while they are added up (flash_attn's mha_bwd)."""
    batch, heads, length, width = query.shape
    if query.dtype == torch.float32 or kwargs.get("attn_mask") is not None:
        # The memory-efficient kernel, which adds up in the gradients themselves. Flash attention takes no mask.
        return 4 * batch * heads * length
    length, width = -(-length // 128) * 128, -(-width // 32) * 32
    return 4 * batch * heads * length * (width + 1)


INSIDE: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
}
"""What operators take on CUDA while they run, beside what they return. Not counted: partial sums of
`kernels.blocks_values`, at most 512 tiles of 64×64 in float32 (8.4 MB), and workspaces of the matrix libraries."""
