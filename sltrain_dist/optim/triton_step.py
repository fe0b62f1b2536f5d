"""Triton kernel for CUDA: a step of Adam whose states are quantized in groups, in one pass over the parameter.

The arithmetic is that of :class:`~sltrain_dist.optim.low_bit.LowBitAdam`, operation by operation, so that the results
are the same bits: divisions and roots are rounded to nearest, and multiplications are not fused with additions (the
launch says so).
"""

# The arguments of kernels are Triton values, for which Triton has no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

_WEYL = tl.constexpr(0x9E3779B1)
_MURMUR_1 = tl.constexpr(0x85EBCA6B)
_MURMUR_2 = tl.constexpr(0xC2B2AE35)


@triton.jit
def _random_bits(key, position):
    """Returns the words of numerics.rounding.random_bits at positions, which count modulo 2^32."""
    word = position.to(tl.uint32) * tl.full([], _WEYL, tl.uint32) + key.to(tl.uint32)
    word = (word ^ (word >> 16)) * tl.full([], _MURMUR_1, tl.uint32)
    word = (word ^ (word >> 13)) * tl.full([], _MURMUR_2, tl.uint32)
    return word ^ (word >> 16)


@triton.jit
def _largest(values, shared):
    """Returns the largest magnitude, NaN if there is a NaN; or the one that ranks share, unless that is NaN."""
    own = tl.max(tl.abs(values), 0)
    is_nan = tl.max((values != values).to(tl.int32), 0) > 0
    own = tl.where(is_nan, float("nan"), own)
    return tl.where(shared == shared, shared, own)


@triton.jit
def _encode(values, scale, borders, table):
    """Returns the number of the level nearest to each value, as Quantizer.encode."""
    scaled = tl.div_rn(values, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(values))
    upper = (scaled.to(tl.int32, bitcast=True) >> 16) + 32768
    code = tl.load(table + upper).to(tl.int32)
    return code + (scaled > tl.load(borders + code)).to(tl.int32)


@triton.jit
def _load_codes(codes, byte, i, inside, BITS: tl.constexpr):
    code = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        code = (code >> (4 * (i % 2))) & 15
    return code


@triton.jit
def _store_codes(codes, code, byte, inside, SIZE: tl.constexpr, BITS: tl.constexpr):
    if BITS == 8:
        tl.store(codes + byte, code.to(tl.uint8), mask=inside)
    else:
        # Neighbours share a byte, the first its low half; a half that is another rank's stays zero.
        low, high = tl.split(tl.reshape(tl.where(inside, code, 0), [SIZE // 2, 2]))
        low_byte, _ = tl.split(tl.reshape(byte, [SIZE // 2, 2]))
        low_inside, high_inside = tl.split(tl.reshape(inside.to(tl.int32), [SIZE // 2, 2]))
        tl.store(codes + low_byte, (low | (high << 4)).to(tl.uint8), mask=(low_inside + high_inside) > 0)


@triton.jit(do_not_specialize=["key", "start", "left"])
def low_bit_adam_kernel(
    parameter, gradient, master, first_codes, first_scales, second_codes, second_scales, shared,
    first_levels, first_borders, first_table, second_levels, second_borders, second_table,
    width, row_bytes, per_row, left, start, key,
    beta1, rest1, beta2, rest2, root_correction, eps, rate, decay_gradient, keep,
    SIZE: tl.constexpr, BITS: tl.constexpr, MASTER: tl.constexpr, SHARED: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr, DECAY_VALUE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Updates one quantization group of a parameter: of rows of `width` values, before the first of which lie `left`.

    beta1, beta2: the decay of the moments; rest1, rest2: 1 − beta. root_correction: (1 − beta2^step)^−½. rate:
    lr / (1 − beta1^step). decay_gradient: the weight decay of Adam; keep: 1 − lr·decay of AdamW. start: position of
    the first value in the whole parameter, and key: of the update, for stochastic rounding.
    """
    group = tl.program_id(0)
    row = (group // per_row).to(tl.int64)
    i = tl.arange(0, SIZE)
    j = group % per_row * SIZE + i - left
    inside = (j >= 0) & (j < width)
    position = row * width + j
    byte = position
    if BITS == 4:
        byte = row * row_bytes + (j + left % 2) // 2

    old = tl.load((master if MASTER else parameter) + position, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + position, mask=inside, other=0.0).to(tl.float32)
    if DECAY_GRADIENT:
        g = g + old * decay_gradient
    first = tl.load(first_levels + _load_codes(first_codes, byte, i, inside, BITS))
    second = tl.load(second_levels + _load_codes(second_codes, byte, i, inside, BITS))
    first = first * tl.load(first_scales + group) * beta1 + g * rest1
    second = second * tl.load(second_scales + group) * beta2 + (g * g) * rest2
    first = tl.where(inside, first, 0.0)
    second = tl.where(inside, second, 0.0)

    first_shared = tl.load(shared + 2 * group) if SHARED else float("nan")
    second_shared = tl.load(shared + 2 * group + 1) if SHARED else float("nan")
    first_scale = _largest(first, first_shared)
    second_scale = _largest(second, second_shared)
    tl.store(first_scales + group, first_scale)
    tl.store(second_scales + group, second_scale)
    code = _encode(first, first_scale, first_borders, first_table)
    _store_codes(first_codes, code, byte, inside, SIZE, BITS)
    code = _encode(second, second_scale, second_borders, second_table)
    _store_codes(second_codes, code, byte, inside, SIZE, BITS)

    change = tl.div_rn(first, tl.sqrt_rn(second) * root_correction + eps) * rate
    if DECAY_VALUE:
        old = old * keep
    new = old - change
    if MASTER:
        tl.store(master + position, new, mask=inside)
    if STOCHASTIC:
        noise = (_random_bits(key, start + position) & 0xFFFF).to(tl.int32)
        bits = new.to(tl.int32, bitcast=True)
        rounded = ((bits + noise) & -0x10000).to(tl.float32, bitcast=True)
        is_finite = (bits & 0x7F800000) != 0x7F800000
        new = tl.where(is_finite, rounded, new)
    tl.store(parameter + position, new.to(parameter.dtype.element_ty), mask=inside)
