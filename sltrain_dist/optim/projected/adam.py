"""GaLore and APOLLO: Adam whose moments are those of a projected gradient.

Sources: GaLore (arXiv 2403.03507; galore-torch 1.0, `galore_torch.adamw`) and APOLLO (arXiv 2412.05270; apollo-torch
1.0.3, `apollo_torch.apollo`), with `proj_type="std"`. Step by step, for the gradient G of an update number t from 1:

- A new projection P in the updates 1, 1 + T, 1 + 2T …, with T = `optim.projection_every`.
- R, the projected gradient; M ← β₁M + (1 − β₁)R and V ← β₂V + (1 − β₂)R², which go on unchanged at a new projection;
  N = M / (√V + ε). So ε is not divided by the bias correction, as it is in torch's Adam.
- η = lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ).
- GaLore: W ← W − η · scale · N, projected back.
- APOLLO: the gradient itself is scaled, G' = G · ‖N‖ / (‖R‖ + 1e-8), with the norms of each column of R (if m < n, or
  else of each row); with apollo-mini, the norms of all of R. If ‖G'‖ is more than 1.01 times that of the last update,
  G' is scaled down to that. W ← W − η · √scale · G'.
- W ← W − lr · decay · W, after the change (torch's AdamW decays before it).

What differs from the published code:

- Both products and the change are in the gradient's type, as there, but moments and norms are computed in float32,
  and rounded to the form of `optim.state_bits`. Its moments are rounded after every operation.
- Quantized states have groups of 256 (8 bits) or 128 values (4 bits) within each row, and the levels of
  numerics/blockwise.py. GaLore's 8-bit optimizer is that of bitsandbytes, with groups of 256 (before version 0.44 of
  2048) values, and it divides ε by the bias correction √(1 − β₂ᵗ).
- APOLLO's projections come from a key of (seed, name, number of the projection), and are computed anew in every
  update, where the published code keeps them. With seeds of the position of a parameter and torch's generator, they
  would depend on the order of the parameters and on the device.
- APOLLO's first update with a gradient is not limited. In the published code, a gradient of 0 limits the next one to
  about 1e-8.
- With several ranks, one of them decomposes a gradient, and sends the projection to the others. In the published code
  all do, so that replicas on different machines may drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.low_bit import LowBitAdam
from sltrain_dist.optim.low_bit_states import State
from sltrain_dist.optim.projected.projection import gaussian_projection, principal_projection, project, project_back
from sltrain_dist.optim.projected.settings import NORM, PROJECTION, ProjectedOptim, low_shape, projection_shape

Job = tuple[Tensor, Callable[[], Tensor]]
"""A tensor, and the function that computes its values."""

Share = Callable[[Sequence[Job]], None]
"""Sets tensors to their computed values, the same on all ranks."""

LIMIT = 1.01
"""Largest factor between the norms of two consecutive changes: APOLLO's norm-growth limiter, from Fira (2410.01623)."""
_TINY = 1e-8


def compute_all(jobs: Sequence[Job]) -> None:
    """Sets tensors to their computed values, on this rank."""
    for target, compute in jobs:
        target.copy_(compute().reshape(-1))


class ProjectedAdam(LowBitAdam):
    """Adam on projected gradients of whole (m, n) matrices; see the module's docstring.

    A parameter's states are those of :class:`LowBitAdam` for a matrix of the projected gradient's shape, and GaLore's
    projection or APOLLO's norm.

    Args:
        groups: Parameter groups with "weight_decay", as for torch's optimizers.
        optim: Optimizer settings.
        ranges: The ranges that the parameters are, which are whole.
        share: Computes new projections, each on one of the ranks.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        optim: ProjectedOptim,
        ranges: Mapping[nn.Parameter, TensorRange],
        share: Share = compute_all,
    ) -> None:
        low = {p: TensorRange.whole("low", low_shape(part.shape, optim.rank)) for p, part in ranges.items()}
        super().__init__(groups, optim, low)
        self._projected, self._share = optim, share
        self._names = {parameter: part.name for parameter, part in ranges.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        updated = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._projected.method == "galore":
            self._share([job for parameter, _ in updated for job in self._new_projection(parameter)])
        for parameter, group in updated:
            state = self._state_of(parameter)
            state["step"] += 1
            self._change(parameter, state, float(group["lr"]))
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def make_state(self, parameter: Tensor) -> State:
        """Returns a parameter's state before the first update: zeros."""
        state, optim = super().make_state(parameter), self._projected
        if optim.method == "galore":
            count = math.prod(projection_shape(tuple(parameter.shape), optim.rank))
            return {**state, PROJECTION: parameter.new_zeros(count)}
        return {**state, NORM: torch.zeros(1, dtype=torch.float32, device=parameter.device)}

    def _new_projection(self, parameter: nn.Parameter) -> list[Job]:
        state, gradient = self._state_of(parameter), parameter.grad
        assert gradient is not None  # callers skip parameters without a gradient
        if state["step"] % self._projected.projection_every:
            return []
        return [(state[PROJECTION], partial(principal_projection, gradient, self._projected.rank))]

    def _change(self, parameter: nn.Parameter, state: State, lr: float) -> None:
        optim, step, gradient = self._projected, state["step"], parameter.grad
        assert gradient is not None  # callers skip parameters without a gradient
        size = lr * math.sqrt(1 - optim.beta2**step) / (1 - optim.beta1**step)
        projection = self._projection(parameter, state)
        low = project(gradient, projection).float()
        if optim.method == "galore":
            direction = self._direction(parameter, state, low).to(gradient.dtype)
            parameter.add_(project_back(direction, projection, gradient.shape), alpha=-size * optim.scale)
            return
        norms = self._norms(low, gradient.shape)
        ratio = self._norms(self._direction(parameter, state, low), gradient.shape).div_(norms.add_(_TINY))
        scaled = gradient * ratio.to(gradient.dtype)
        parameter.sub_(scaled.mul_(_limit(scaled, state[NORM]).mul_(size * math.sqrt(optim.scale))))

    def _projection(self, parameter: nn.Parameter, state: State) -> Tensor:
        optim, shape = self._projected, tuple(parameter.shape)
        if optim.method == "galore":
            stored: Tensor = state[PROJECTION]
            return stored.view(projection_shape(shape, optim.rank))
        number = (state["step"] - 1) // optim.projection_every
        assert parameter.grad is not None  # callers skip parameters without a gradient
        return gaussian_projection(parameter.grad, optim.rank, optim.seed, f"{self._names[parameter]}.{number}")

    def _direction(self, parameter: Tensor, state: State, low: Tensor) -> Tensor:
        """Updates the moments by the projected gradient, and overwrites this by M / (√V + ε)."""
        flat = low.view(-1)
        for chunk in self._chunks(parameter):
            values = flat[chunk.start : chunk.stop]
            moments = self._moments_after(parameter, state, chunk, values)
            self._write_moments(parameter, state, chunk, moments)
            values.copy_(moments.first.div_(moments.second.sqrt_().add_(self._projected.eps)))
        return low

    def _norms(self, low: Tensor, shape: torch.Size) -> Tensor:
        """Returns the norms of a projected matrix that scale the gradient, (m, 1), (1, n) or (1, 1)."""
        m, n = shape
        dim = (0, 1) if self._projected.method == "apollo-mini" else (1 if m >= n else 0)
        return torch.linalg.vector_norm(low, dim=dim, keepdim=True)


def _limit(scaled: Tensor, previous: Tensor) -> Tensor:
    """Returns the factor, (1,), that limits a change to :data:`LIMIT` times the previous norm, which it replaces."""
    norm = torch.linalg.vector_norm(scaled, dtype=torch.float32)
    growth = (norm / (previous + _TINY)).clamp_(min=LIMIT).div_(LIMIT)
    factor = torch.where(previous > 0, growth.reciprocal(), 1.0)
    previous.copy_(norm * factor)
    return factor
