"""Initial values keyed by (seed, name): the same on every machine, rank and device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sltrain_dist.numerics.int8_weight import Int8Weight
from sltrain_dist.numerics.splitmix import key64


def draw_seed() -> int:
    """A seed drawn from torch's default generator, which `torch.manual_seed` sets."""
    with _disable_current_modes():  # a fake tensor's number could not be read
        return int(torch.randint(2**63 - 1, (), device="cpu"))


def fill_(
    tensor: torch.Tensor, seed: int, name: str, *, uniform: float | None = None, normal: float | None = None
) -> None:
    """Fills `tensor` from U(−uniform, uniform) or N(0, normal²), keyed by (seed, name).

    Drawn in float32 on the CPU, whatever the tensor's type and device, so that a model starts from the same
    weights everywhere, and in blocks, so that the transient memory stays at 64 MiB; an int8 weight's are drawn at once.
    """
    if isinstance(tensor, Int8Weight):
        drawn = torch.empty(tensor.shape)
        fill_(drawn, seed, name, uniform=uniform, normal=normal)
        with torch.no_grad():
            tensor.copy_(drawn)
        return
    if (uniform is None) == (normal is None):
        raise ValueError("give exactly one of uniform and normal")
    generator = torch.Generator().manual_seed(key64(seed, name) >> 1)
    flat = tensor.detach().view(-1)
    for start in range(0, flat.numel(), 1 << 24):
        part = flat[start : start + (1 << 24)]
        draw = torch.empty(part.numel(), dtype=torch.float32)
        if uniform is not None:
            draw.uniform_(-uniform, uniform, generator=generator)
        else:
            draw.normal_(0.0, float(normal or 0.0), generator=generator)
        part.copy_(draw)
