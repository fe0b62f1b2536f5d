"""How gradients are clipped when each is used up before the others are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sltrain_dist.config.schema import OptimConfig

_EPS = 1e-6
"""Added to a norm before it divides, as torch.nn.utils.clip_grad_norm_ does."""


def coefficient(norm: float, max_norm: float) -> float:
    """What brings a gradient of `norm` down to `max_norm`, if it is larger; 1 else, and for a `max_norm` of 0."""
    return min(1.0, max_norm / (norm + _EPS)) if max_norm > 0 else 1.0


@dataclass
class PerLayerClip:
    """The scale of each gradient under per-layer updates, by `optim.clip_mode`.

    Attributes:
        optim: Optimizer settings.
        norm: The global norm that gradients are scaled by: the last update's, or in the second of two passes
            this one's. None: not known, every parameter is clipped by its own.
    """

    optim: OptimConfig
    norm: float | None = None

    def begin_update(self, previous_norm: float | None) -> None:
        """Takes the norm of the update before; None in the very first."""
        self.norm = previous_norm if self.optim.clip_mode == "previous_norm" else None

    def apply(self, gradient: Tensor, own_square: Callable[[], Tensor]) -> None:
        """Scales one parameter's gradient, in place.

        Args:
            gradient: This rank's part of it.
            own_square: Gives the squared norm of the whole gradient, a scalar, the same on every rank that holds
                a part; called only where it is needed, and then on all of them.
        """
        if self.optim.clip == 0:
            return
        if self.norm is not None:
            scale = coefficient(self.norm, self.optim.clip)
            if scale < 1:
                gradient.mul_(scale)
            return
        # No number leaves the device: the update of one parameter does not wait for the next one's gradient.
        norm = own_square().sqrt()
        gradient.mul_(torch.clamp(self.optim.clip / (norm + _EPS), max=1.0).to(gradient.dtype))
