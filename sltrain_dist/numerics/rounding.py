"""Stochastic rounding to bfloat16 and to integers. The random bits depend only on a key and each value's position."""

from __future__ import annotations

import torch
from torch import Tensor

from sltrain_dist.numerics.splitmix import key_bytes

_MASK = 0xFFFFFFFF
# Odd; those above 2^31 are given as negative numbers, so that a product with 32 bits fits int64.
_STEP = 0x9E3779B1 - (1 << 32)
_MURMUR_1 = 0x85EBCA6B - (1 << 32)
_MURMUR_2 = 0xC2B2AE35 - (1 << 32)


def rounding_key(step: int, name: str) -> int:
    """Returns the 32-bit key of update `step` of the parameter `name`."""
    return int.from_bytes(key_bytes(step, name)[:4], "big")


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Returns `count` random 32-bit words, as int64, for the positions from `start` on; the same on any device.

    MurmurHash3's 32-bit finaliser (Appleby, public domain) over a Weyl sequence from `key`, in int64 arithmetic.
    Positions count modulo 2^32. Needs 16 bytes per value, result included.
    """
    word = torch.arange(start, start + count, dtype=torch.int64, device=device)
    word.bitwise_and_(_MASK).mul_(_STEP).add_(key).bitwise_and_(_MASK)
    word ^= word >> 16
    word.mul_(_MURMUR_1).bitwise_and_(_MASK)
    word ^= word >> 13
    word.mul_(_MURMUR_2).bitwise_and_(_MASK)
    word ^= word >> 16
    return word


def stochastic_round(values: Tensor, key: int, start: int) -> Tensor:
    """Rounds float32 values up or down to bfloat16, with probabilities that make the mean exact.

    Adds a random number below one unit in the last place, and cuts off what is below that unit. Values that are not
    finite stay as they are.

    Args:
        values: Flat float32 tensor.
        key: Key from :func:`rounding_key`.
        start: Position of the first value in the whole parameter.
    """
    noise = random_bits(key, start, values.numel(), values.device).bitwise_and_(0xFFFF).to(torch.int32)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def stochastic_integers(values: Tensor, key: int, start: int) -> Tensor:
    """Rounds float32 values up or down to integers, with probabilities that make the mean exact to 2^-24.

    Args:
        values: Flat float32 tensor; it is overwritten.
        key: Key from :func:`rounding_key`.
        start: Position of the first value in the whole parameter.

    Returns:
        The integers, as float32.
    """
    lower = values.floor()
    fraction = values.sub_(lower).mul_(float(1 << 24))  # both operations are exact
    word = random_bits(key, start, values.numel(), values.device).bitwise_right_shift_(8)
    return lower.add_(word < fraction)
