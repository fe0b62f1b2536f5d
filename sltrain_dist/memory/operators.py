"""What is known of single operators: the scratch memory that they take on a GPU, their FLOPs, and a GPU's choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry

import sltrain_dist.sparse_lowrank.kernels.torch_kernels  # noqa: F401  registers operators
from sltrain_dist.config.schema import Config
from sltrain_dist.numerics.device import DeviceType, emulate

aten, ours = torch.ops.aten, torch.ops.sltrain


@contextmanager
def operators_of(device: DeviceType, config: Config) -> Iterator[None]:
    """Makes the code in the block choose operators as on a device.

    Args:
        device: Whose operators; "cpu": those of the machine.
        config: The run.
    """
    if device == "cpu":
        yield
        return
    heads, masked = config.model, config.data.reset_attention
    # Flash attention takes no float32, and the memory-efficient kernel no grouped heads (torch's sdp_utils.cpp).
    unfused = config.train.dtype == "fp32" and heads.kv_heads != heads.num_heads and not masked
    with emulate("cuda"), sdpa_kernel(SDPBackend.MATH) if unfused else nullcontext():
        yield


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> int:
    """The gradients of queries and one sum a row are in float32 while they are added up; with grouped heads keys and
    values have gradients for every query head first (flash_attn's mha_bwd)."""
    batch, heads, length, width = query.shape
    if query.dtype == torch.float32 or kwargs.get("attn_mask") is not None:
        # The memory-efficient kernel, which adds up in the gradients themselves. Flash attention takes no mask.
        return 4 * batch * heads * length
    expanded = 2 * batch * heads * length * width * query.element_size() if key.shape[1] != heads else 0
    length, width = -(-length // 128) * 128, -(-width // 32) * 32
    return 4 * batch * heads * length * (width + 1) + expanded


def _svd(matrix: Tensor, *args: Any, **kwargs: Any) -> int:
    """A column-major copy, because cuSOLVER overwrites its input (torch's BatchLinearAlgebraLib.cpp)."""
    return matrix.nbytes


SCRATCH_BYTES: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
    aten._linalg_svd.default: _svd,
}
"""Bytes that operators take on CUDA while they run, beside what they return. Not counted: partial sums of
`kernels.blocks_values`, at most 512 tiles of 64×64 in float32 (8.4 MB), and workspaces of the matrix libraries."""


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> int:
    """Two products over half of all pairs of tokens: causal attention leaves out the other half."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * length * width


def _attention_backward(grad: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> int:
    """Five products for two (FlashAttention-2, arXiv 2307.08691, section 4.1)."""
    return _attention(query) * 5 // 2


def _blocks(features: Tensor, V: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * V.numel() * features.shape[1]


def _blocks_values(grads: Tensor, inputs: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return 2 * out_val.numel() * grads.shape[1]


def _weighted_sums(rows: Tensor, which: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * which.numel() * rows.shape[1]


def _dot_products(outputs: Tensor, inputs: Tensor, columns: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * columns.numel() * outputs.shape[1]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: addmm_flop,
    aten.baddbmm_: baddbmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    ours.blocks_outputs: _blocks,
    ours.blocks_inputs: _blocks,
    ours.blocks_values: _blocks_values,
    aten._embedding_bag_forward_only: _weighted_sums,
    aten._embedding_bag_per_sample_weights_backward: _dot_products,
}
"""Floating-point operations by operator, two for a multiply-add: torch's formulas, and those it does not have.
Elementwise work is left out. Called with the operator's arguments and its result as `out_val`."""
