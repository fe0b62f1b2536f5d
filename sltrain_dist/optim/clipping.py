"""Gradient clipping for updates that apply each gradient before the others are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sltrain_dist.config.schema import OptimConfig

_EPS = 1e-6
"""Added to a norm before dividing by it, as in torch.nn.utils.clip_grad_norm_."""


def coefficient(norm: float, max_norm: float) -> float:
    """Returns the factor that scales a gradient of `norm` down to `max_norm`, at most 1; 1 for a `max_norm` of 0."""
    return min(1.0, max_norm / (norm + _EPS)) if max_norm > 0 else 1.0


@dataclass
class PerLayerClip:
    """Clipping of each gradient under per-layer updates, by `optim.clip_mode`.

    Attributes:
        optim: Optimizer settings.
        norm: The global norm by which gradients are scaled: the previous update's or, in the second of two passes, this
            update's. None: not known; every parameter is clipped by its own norm.
    """

    optim: OptimConfig
    norm: float | None = None

    def begin_update(self, previous_norm: float | None) -> None:
        """Sets the global norm of the previous update; None in the very first."""
        self.norm = previous_norm if self.optim.clip_mode == "previous_norm" else None

    def apply(self, gradient: Tensor, own_square: Callable[[], Tensor]) -> None:
        """Scales one parameter's gradient, in place.

        Args:
            gradient: This rank's part of the gradient.
            own_square: Returns the squared norm of the parameter's whole gradient, a scalar, the same on every rank
                that holds a part. Called only if needed, and then on all of these ranks.
        """
        if self.optim.clip == 0:
            return
        if self.norm is not None:
            scale = coefficient(self.norm, self.optim.clip)
            if scale < 1:
                gradient.mul_(scale)
            return
        # The norm stays on the device: the update of one parameter does not wait for the next one's gradient.
        norm = own_square().sqrt()
        gradient.mul_(torch.clamp(self.optim.clip / (norm + _EPS), max=1.0).to(gradient.dtype))
