"""Counter-based random numbers (no torch): the same on every machine, rank and library version.

SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) applies a finaliser to a Weyl sequence, so that any part of a stream can be
computed on its own. It is implemented here because a library generator's stream may change between versions, and
neither the supports nor the order of the data may.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_LOW32 = np.uint64(0xFFFFFFFF)
_S32 = np.uint64(32)
_CHUNK = 1 << 14  # words computed at a time, so that a dozen passes over them stay in the cache


def key_bytes(seed: int, name: str) -> bytes:
    """Returns the SHA-256 digest of "seed:name", from which every keyed stream takes its key."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def key64(seed: int, name: str) -> int:
    """Returns the first 8 bytes of :func:`key_bytes`, as a big-endian integer."""
    return int.from_bytes(key_bytes(seed, name)[:8], "big")


def splitmix64(key: int, start: int, count: int) -> UInt64:
    """Returns values `start` … `start + count - 1` of the SplitMix64 stream of `key`."""
    z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z *= _GOLDEN
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def first_word(key: int) -> int:
    """Returns `splitmix64(key, 0, 1)[0]`, in Python's integers, which are faster for a single word."""
    z = (int(_GOLDEN) + key) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def below(words: UInt64, bound: int) -> UInt64:
    """Maps uniform 64-bit words to uniform integers in [0, bound): the high half of words · bound.

    The bias is under bound / 2^64. (Multiply-shift without rejection: Lemire, arXiv 1805.10941.)
    """
    high, low = words >> _S32, words & _LOW32
    b_high, b_low = np.uint64(bound >> 32), np.uint64(bound & 0xFFFFFFFF)
    middle = high * b_low + ((low * b_low) >> _S32)
    if not b_high:
        return middle >> _S32
    middle_2 = low * b_high + (middle & _LOW32)
    return high * b_high + (middle >> _S32) + (middle_2 >> _S32)


def integers(key: int, start: int, count: int, bound: int) -> npt.NDArray[np.int64]:
    """Returns values `start` … `start + count - 1` of the stream of `key`, as uniform integers in [0, bound)."""
    values = np.empty(count, dtype=np.int64)
    for first in range(0, count, _CHUNK):
        part = min(_CHUNK, count - first)
        values[first : first + part] = below(splitmix64(key, start + first, part), bound)
    return values


def permutation(key: int, size: int) -> npt.NDArray[np.int64]:
    """Returns a uniform permutation of 0 … size − 1: the argsort of the first `size` words of the stream of `key`."""
    return np.argsort(splitmix64(key, 0, size), kind="stable")
