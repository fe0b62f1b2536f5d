"""The operator around the Triton kernel of a step of Adam with quantized states."""

from __future__ import annotations

import torch
from torch import Tensor

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.blockwise import Quantizer
from sltrain_dist.numerics.rounding import rounding_key
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.state_layout import GROUP_SIZES, MASTER


def fused_step(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    quantizers: tuple[Quantizer, Quantizer],
    part: TensorRange,
    optim: OptimConfig,
    *,
    step: int,
    number: int,
    lr: float,
    decay: float,
    shared: Tensor | None,
) -> None:
    """Updates a parameter and its quantized states in place, with the bits that :class:`LowBitAdam` gives in chunks.

    Args:
        parameter: This rank's range of the parameter, contiguous.
        gradient: Its gradient.
        state: The states: codes and scales of both moments, and master weights if there are any.
        quantizers: Those of the first and the second moment.
        part: Which range of which parameter it is.
        optim: Optimizer settings.
        step: Number of this update since the states were last cleared, from 1.
        number: Number of this update of the parameter, from 1, which keys stochastic rounding.
        lr: Learning rate.
        decay: Weight decay of the parameter.
        shared: (groups, 2) largest magnitudes of both moments in groups that ranks share, NaN for all others; or None.
    """
    step_of_adam_(
        parameter.detach(), gradient.contiguous(), state.get(MASTER),
        state["exp_avg.codes"], state["exp_avg.scales"], state["exp_avg_sq.codes"], state["exp_avg_sq.scales"], shared,
        [table for q in quantizers for table in (q.levels, q.borders, q.table)],
        part.row if part.is_matrix else part.count, 0 if part.is_matrix else part.start % GROUP_SIZES[optim.state_bits],
        part.start, rounding_key(number, part.name), optim.state_bits,
        [
            optim.beta1, 1 - optim.beta1, optim.beta2, 1 - optim.beta2, (1 - optim.beta2**step) ** -0.5, optim.eps,
            lr / (1 - optim.beta1**step), decay, 1 - lr * decay,
        ],
        decay > 0 and optim.name == "adam", decay > 0 and optim.name == "adamw",
        optim.stochastic_rounding and parameter.dtype == torch.bfloat16,
    )  # fmt: skip


@torch.library.custom_op(
    "sltrain::step_of_adam_",
    mutates_args=("parameter", "master", "first_codes", "first_scales", "second_codes", "second_scales"),
)
def step_of_adam_(
    parameter: Tensor,
    gradient: Tensor,
    master: Tensor | None,
    first_codes: Tensor,
    first_scales: Tensor,
    second_codes: Tensor,
    second_scales: Tensor,
    shared: Tensor | None,
    tables: list[Tensor],
    width: int,
    left: int,
    start: int,
    key: int,
    bits: int,
    factors: list[float],
    decay_gradient: bool,
    decay_value: bool,
    stochastic: bool,
) -> None:
    """See :func:`fused_step` and the kernel, whose argument `factors` are the numbers from beta1 to keep."""
    from sltrain_dist.optim.triton_step import low_bit_adam_kernel  # not at the top: Triton may not be installed

    size = GROUP_SIZES[bits]
    with torch.cuda.device_of(parameter):
        low_bit_adam_kernel[(first_scales.numel(),)](
            parameter, gradient, parameter if master is None else master,
            first_codes, first_scales, second_codes, second_scales, first_scales if shared is None else shared,
            *tables, width, -(-width // 2), -(-(left + width) // size), left, start, key, *factors,
            SIZE=size, BITS=bits, MASTER=master is not None, SHARED=shared is not None,
            DECAY_GRADIENT=decay_gradient, DECAY_VALUE=decay_value, STOCHASTIC=stochastic,
            num_warps=1 if bits == 4 else 2, enable_fp_fusion=False,
        )  # fmt: skip
