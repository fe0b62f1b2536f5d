"""Adam and AdamW whose states are float32 or block-quantized, and whose bf16 parameters are rounded stochastically or
have fp32 master weights.

The arithmetic is torch's, in float32, on a bounded chunk of values at a time. It consists of additions,
multiplications, divisions and roots alone, one operation after the other. Each of these gives the same bits wherever a
value lies, so that the update of a parameter does not depend on how it is divided into chunks or sharded. On CUDA with
Triton, one kernel does the same to a whole parameter with quantized states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.gpu_kernels import use_kernels
from sltrain_dist.numerics.int8_weight import Int8Weight
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.fused_step import fused_step
from sltrain_dist.optim.low_bit_states import CLEARED_AT, LowBitOptimizer, State
from sltrain_dist.optim.state_layout import GROUP_SIZES, STATE_NAMES, UpdateChunk, is_quantized, shared_groups

AllReduceMax = Callable[[Tensor], None]
"""Replaces a float32 tensor, in place, by its maximum over all ranks that hold ranges of the same parameters."""


@dataclass(frozen=True)
class Moments:
    """Both moments of a chunk after this update; flat, float32."""

    first: Tensor
    second: Tensor


class LowBitAdam(LowBitOptimizer):
    """Adam (weight decay is part of the gradient) or AdamW, by `optim.name`.

    The update uses the new moments before they are quantized. A quantization group that ranks share is scaled by its
    largest magnitude on all of them, which one all-reduce per step finds for all parameters together.

    Args:
        groups: Parameter groups with "weight_decay", as for torch's optimizers.
        optim: Optimizer settings.
        ranges: Which range of which parameter each tensor in `groups` is.
        all_reduce_max: Required if ranks share quantization groups. Then all ranks must step equally often, including
            those whose range is empty.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        optim: OptimConfig,
        ranges: Mapping[nn.Parameter, TensorRange],
        all_reduce_max: AllReduceMax | None = None,
    ) -> None:
        super().__init__(groups, optim, ranges)
        self._all_reduce_max = all_reduce_max
        self._shared = {p: shared_groups(part, optim.state_bits) for p, part in self._ranges.items()}
        if any(self._shared.values()) and all_reduce_max is None:
            raise ValueError("ranks share quantization groups: pass all_reduce_max, for common scales")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        maxima = self._shared_maxima()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    state = self._state_of(parameter)
                    state["step"] += 1
                    if self._is_fused(parameter):
                        self._update_at_once(parameter, state, group, maxima.get(parameter, {}))
                        continue
                    for chunk in self._chunks(parameter):
                        self._update(parameter, state, chunk, group, maxima.get(parameter, {}))

    def _shared_maxima(self) -> dict[Tensor, dict[int, Tensor]]:
        """Returns the largest magnitudes of both new moments, (2,), of the shared groups by number; one all-reduce."""
        shared = [(parameter, group) for parameter, groups in self._shared.items() for group in groups]
        if not shared or self._all_reduce_max is None:
            return {}
        device, size = shared[0][0].device, GROUP_SIZES[self._optim.state_bits]
        largest = torch.zeros(len(shared), 2, device=device)
        for row, (parameter, group) in zip(largest, shared, strict=True):
            part = self._ranges[parameter]
            start, stop = max(part.start, group * size), min(part.stop, (group + 1) * size)
            if start < stop and parameter.grad is not None:
                number = group - part.start // size
                chunk = UpdateChunk(start - part.start, stop - part.start, 1, start - group * size, number, number + 1)
                moments = self._moments(parameter, self._state_of(parameter), chunk, self._decay_of(parameter))
                row.copy_(torch.stack((moments.first.abs().amax(), moments.second.abs().amax())))
        self._all_reduce_max(largest)
        maxima: dict[Tensor, dict[int, Tensor]] = {}
        for row, (parameter, group) in zip(largest, shared, strict=True):
            maxima.setdefault(parameter, {})[group - self._ranges[parameter].start // size] = row
        return maxima

    def _decay_of(self, parameter: Tensor) -> float:
        """Returns the weight decay of a parameter's group."""
        return next(
            float(group["weight_decay"])
            for group in self.param_groups
            if any(parameter is other for other in group["params"])
        )

    def _is_fused(self, parameter: Tensor) -> bool:
        """Returns whether one kernel makes the whole update of a parameter."""
        quantized = is_quantized(self._ranges[parameter].shape, self._optim.state_bits)
        return quantized and not isinstance(parameter, Int8Weight) and use_kernels(parameter)

    def _update_at_once(
        self, parameter: Tensor, state: State, group: dict[str, Any], maxima: Mapping[int, Tensor]
    ) -> None:
        first, second = STATE_NAMES[self._optim.name]
        groups, shared = state[f"{first}.scales"].numel(), None
        mine = {number: maximum for number, maximum in maxima.items() if 0 <= number < groups}
        if mine:
            shared = torch.full((groups, 2), torch.nan, device=parameter.device)
            for number, maximum in mine.items():
                shared[number] = maximum
        assert parameter.grad is not None  # callers skip parameters without a gradient
        fused_step(
            parameter,
            parameter.grad,
            state,
            (self._quantizer(parameter, first), self._quantizer(parameter, second)),
            self._ranges[parameter],
            self._optim,
            step=state["step"],
            number=state["step"] + state[CLEARED_AT],
            lr=float(group["lr"]),
            decay=float(group["weight_decay"]),
            shared=shared,
        )

    def _update(
        self,
        parameter: Tensor,
        state: State,
        chunk: UpdateChunk,
        group: dict[str, Any],
        maxima: Mapping[int, Tensor],
    ) -> None:
        optim, step, lr = self._optim, state["step"], float(group["lr"])
        decay = float(group["weight_decay"])
        moments = self._moments(parameter, state, chunk, decay)
        self._write_moments(parameter, state, chunk, moments, maxima)
        # In place: the moments are no longer needed.
        denominator = moments.second.sqrt_().mul_((1 - optim.beta2**step) ** -0.5).add_(optim.eps)
        change = moments.first.div_(denominator).mul_(lr / (1 - optim.beta1**step))
        values = self._values(parameter, state, chunk)
        if decay and optim.name == "adamw":
            values = values * (1 - lr * decay)
        # Rounding is keyed by all updates ever made, so that the random numbers do not repeat after a restart.
        self._store_values(parameter, state, chunk, values - change, step + state[CLEARED_AT])

    def _moments(self, parameter: Tensor, state: State, chunk: UpdateChunk, decay: float) -> Moments:
        optim, grad = self._optim, parameter.grad
        assert grad is not None  # callers skip parameters without a gradient
        gradient = grad.reshape(-1)[chunk.start : chunk.stop].float()
        if decay and optim.name == "adam":
            gradient = gradient + self._values(parameter, state, chunk) * decay
        return self._moments_after(parameter, state, chunk, gradient)

    def _moments_after(self, parameter: Tensor, state: State, chunk: UpdateChunk, gradient: Tensor) -> Moments:
        """Returns both moments of a chunk after an update by a gradient, flat and float32."""
        optim = self._optim
        first, second = (self._read(parameter, state, key, chunk) for key in STATE_NAMES[optim.name])
        first.mul_(optim.beta1).add_(gradient * (1 - optim.beta1))
        second.mul_(optim.beta2).add_((gradient * gradient).mul_(1 - optim.beta2))
        return Moments(first, second)

    def _write_moments(
        self,
        parameter: Tensor,
        state: State,
        chunk: UpdateChunk,
        moments: Moments,
        maxima: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Stores both moments of a chunk; `maxima` are those of groups that ranks share."""
        for i, (key, value) in enumerate(
            zip(STATE_NAMES[self._optim.name], (moments.first, moments.second), strict=True)
        ):
            shared_scales = {number: maximum[i] for number, maximum in (maxima or {}).items()}
            self._write(parameter, state, key, chunk, value, shared_scales)
