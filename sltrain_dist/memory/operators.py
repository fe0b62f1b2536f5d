"""Properties of single operators: their scratch memory on a GPU, their FLOPs, and which of them a GPU would use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry

from sltrain_dist.config.schema import Config
from sltrain_dist.numerics.device import DeviceType, emulate
from sltrain_dist.sparse_lowrank.kernels.torch_kernels import values_plan  # the import registers the operators

aten, sltrain_ops = torch.ops.aten, torch.ops.sltrain


@contextmanager
def operators_of(device: DeviceType, config: Config) -> Iterator[None]:
    """Makes the code in the block choose operators as it would on a device.

    Args:
        device: The device.
        config: The run.
    """
    model, masked = config.model, config.data.reset_attention
    # Flash attention does not support float32, nor the memory-efficient kernel grouped heads (torch's sdp_utils.cpp).
    unfused = device == "cuda" and config.train.dtype == "fp32" and model.kv_heads != model.num_heads and not masked
    with emulate(device), sdpa_kernel(SDPBackend.MATH) if unfused else nullcontext():
        yield


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> int:
    """Returns scratch bytes: the queries' gradients and a sum per row are accumulated in float32; with grouped heads,
    keys and values first get a gradient for every query head (flash_attn's mha_bwd)."""
    batch, heads, length, width = query.shape
    if query.dtype == torch.float32 or kwargs.get("attn_mask") is not None:
        # The memory-efficient kernel accumulates in the gradients. Flash attention does not support masks.
        return 4 * batch * heads * length
    expanded = 2 * batch * heads * length * width * query.element_size() if key.shape[1] != heads else 0
    length, width = -(-length // 128) * 128, -(-width // 32) * 32
    return 4 * batch * heads * length * (width + 1) + expanded


def _svd(matrix: Tensor, *args: Any, **kwargs: Any) -> int:
    """Returns the bytes of a column-major copy: cuSOLVER overwrites its input (torch's BatchLinearAlgebraLib.cpp)."""
    return matrix.nbytes


def _blocks_partial_sums(g: Tensor, inputs: Tensor, places: Tensor, shift: int, m: int, k: int) -> int:
    """Returns the bytes of the sums of chunks of tokens, where there are several."""
    plan = values_plan(g.shape[0], m, k, places.numel() // k, g.dtype)
    return 4 * plan.chunks * m * k if plan.chunks > 1 else 0


SCRATCH_BYTES: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
    aten._linalg_svd.default: _svd,
    sltrain_ops.blocks_values.default: _blocks_partial_sums,
}
"""Bytes that operators allocate on CUDA while they run, beyond their results. Not counted: workspaces of the matrix
libraries."""


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> int:
    """Returns FLOPs: two products over half of all pairs of tokens, because attention is causal."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * length * width


def _attention_backward(grad: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> int:
    """Returns FLOPs: five products instead of two (FlashAttention-2, arXiv 2307.08691, section 4.1)."""
    return _attention(query) * 5 // 2


def _blocks_outputs(
    inputs: Tensor, V: Tensor, places: Tensor, shift: int, tokens: int, h: Tensor | None, B: Tensor | None,
    **kwargs: Any,
) -> int:  # fmt: skip
    return 2 * tokens * (V.numel() + (0 if B is None else B.numel()))


def _blocks_inputs(g: Tensor, V: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * V.numel() * g.shape[0]


def _blocks_values(g: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return 2 * out_val.numel() * g.shape[0]


def _weighted_sums(rows: Tensor, which: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * which.numel() * rows.shape[1]


def _dot_products(outputs: Tensor, inputs: Tensor, columns: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * columns.numel() * outputs.shape[1]


def _qr(matrix: Tensor, *args: Any, **kwargs: Any) -> int:
    """Returns FLOPs: Householder vectors of an (m, r) matrix, and as many for the (m, r) factor Q (Golub and Van Loan,
    Matrix Computations, section 5.2)."""
    m, r = matrix.shape
    return 2 * (2 * m * r * r - 2 * r**3 // 3)


def _svd_flops(matrix: Tensor, *args: Any, **kwargs: Any) -> int:
    """Returns FLOPs of a square matrix's full decomposition (Golub and Van Loan, section 8.6, Golub–Reinsch)."""
    m, n = matrix.shape
    return 14 * m * n * n + 8 * n**3


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.linalg_qr: _qr,
    aten._linalg_svd: _svd_flops,
    aten.addmm_: addmm_flop,
    aten.baddbmm_: baddbmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    sltrain_ops.blocks_outputs: _blocks_outputs,
    sltrain_ops.blocks_inputs: _blocks_inputs,
    sltrain_ops.blocks_values: _blocks_values,
    aten._embedding_bag: _weighted_sums,
    aten._embedding_bag_forward_only: _weighted_sums,
    aten._embedding_bag_per_sample_weights_backward: _dot_products,
}
"""Formulas for the FLOPs of operators, two for a multiply-add: torch's, and those that torch lacks. Elementwise
operators have none. They are called with the operator's arguments and with its result as `out_val`."""
