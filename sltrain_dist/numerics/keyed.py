"""Counter-based random numbers keyed by (seed, name): the same on every machine, rank and library version."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

UInt64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW32 = np.uint64(0xFFFFFFFF)
_S32 = np.uint64(32)
_CHUNK = 1 << 14  # words at a time: the dozen passes over them stay in the cache


def key_bytes(seed: int, name: str) -> bytes:
    """SHA-256 of "seed:name", from which every keyed stream takes its key."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def key64(seed: int, name: str) -> int:
    """The first 8 bytes of :func:`key_bytes`, big-endian."""
    return int.from_bytes(key_bytes(seed, name)[:8], "big")


def splitmix64(key: int, start: int, count: int) -> UInt64:
    """Values number `start` to `start + count - 1` of the SplitMix64 stream of `key`.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) is a finaliser over a Weyl sequence, so that any part of
    the stream can be computed on its own.
    """
    z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z *= _GOLDEN
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def below(words: UInt64, bound: int) -> UInt64:
    """Maps uniform 64-bit words to uniform integers in [0, bound): the high half of words · bound.

    The bias is under bound / 2^64. (Multiply-shift, Lemire, arXiv 1805.10941, without the rejection.)
    """
    high, low = words >> _S32, words & _LOW32
    b_high, b_low = np.uint64(bound >> 32), np.uint64(bound & 0xFFFFFFFF)
    middle = high * b_low + ((low * b_low) >> _S32)
    if not b_high:
        return middle >> _S32
    middle_2 = low * b_high + (middle & _LOW32)
    return high * b_high + (middle >> _S32) + (middle_2 >> _S32)


def integers(key: int, start: int, count: int, bound: int) -> npt.NDArray[np.int64]:
    """Values number `start` to `start + count - 1` of the stream of `key`, as uniform integers in [0, bound)."""
    values = np.empty(count, dtype=np.int64)
    for first in range(0, count, _CHUNK):
        part = min(_CHUNK, count - first)
        values[first : first + part] = below(splitmix64(key, start + first, part), bound)
    return values


def permutation(key: int, size: int) -> npt.NDArray[np.int64]:
    """A uniform permutation of 0 … size − 1: the order of the first `size` words of the stream of `key`."""
    return np.argsort(splitmix64(key, 0, size), kind="stable")


def fill_(
    tensor: torch.Tensor, seed: int, name: str, *, uniform: float | None = None, normal: float | None = None
) -> None:
    """Fills `tensor` from U(−uniform, uniform) or N(0, normal²), keyed by (seed, name).

    Drawn in float32 on the CPU, whatever the tensor's type and device, so that a model starts from the same
    weights everywhere, and in blocks, so that the transient memory stays at 64 MiB.
    """
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
