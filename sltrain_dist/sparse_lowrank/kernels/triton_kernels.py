"""Triton kernels for CUDA: the products of `blocks`, and the scatter and gather of `stratified`.

:mod:`.torch_kernels` launches the kernels and documents their arguments.

`blocks`. Reading permuted features of a row-major matrix inside a product would move a 32-byte sector for every 2-byte
element, and so cost as much as the dense layer (and Triton has no gather from shared memory: its own becomes thousands
of shuffles). So the products run in transposed form, features × tokens, where permuting is choosing rows and costs
nothing: it is fused, with every mask and window, into the loads and stores of the product kernels. Transposing is a
pass at the speed of a copy, once for an input that q, k and v share, and once for a gradient that dx and dV share.
Transposed matrices have their tokens padded with zeros to a multiple of 16, so that every access but those on the
row-major side is of 16 bytes, whatever T.

`stratified`. The scatter into W and the gather from its gradient touch about k/n of the matrix; one kernel that hashes
in registers replaces torch's dozen passes over int64 positions. Fusing it into the product BA would save nothing: the
product must write W anyway, and the scatter then finds it in the cache.

Every result is the same from run to run: there are no atomics, every sum has a fixed order and is in float32, and the
configurations that tuning chooses from differ only in what cannot change a result (warps and pipeline stages).
"""

# The arguments of kernels are Triton values, for which Triton has no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_ROW_STEP = tl.constexpr(0x9E3779B1)
_SLOT_STEP = tl.constexpr(0x61C88647)
_MURMUR_1 = tl.constexpr(0x85EBCA6B)
_MURMUR_2 = tl.constexpr(0xC2B2AE35)
# Triton 3.7's interpreter stores bf16 as its bits, and multiplies those as integers.
_UPCAST = tl.constexpr(_INTERPRETED)


def _tuned(key: list[str], choices: list[tuple[int, int]]) -> triton.runtime.Autotuner:
    """Autotunes over (warps, stages); the interpreter, which has neither, takes the first."""
    choices = choices[:1] if _INTERPRETED else choices
    return triton.autotune([triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in choices], key)


@triton.jit
def _multiply_add(left, right, total, PRECISION: tl.constexpr):
    if _UPCAST:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _first_output(run, m, windows):
    """Returns the first output of a run, as sizes.first_output."""
    return run * (m // windows) + tl.minimum(run, m % windows)


@_tuned(["features"], [(4, 1), (8, 1), (2, 1)])
@triton.jit
def transpose_kernel(x, out, tokens, features, stride, BLOCK: tl.constexpr):
    """Writes x (tokens, features) transposed to out (features, stride), zeros in columns tokens … stride − 1."""
    tiles = tl.cdiv(features, BLOCK)
    program = tl.program_id(0)
    t = (program // tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    c = (program % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    tile = tl.load(x + t[:, None] * features + c, mask=(t < tokens)[:, None] & (c < features), other=0.0)
    tl.store(out + c[:, None] * stride + t, tl.trans(tile), mask=(c < features)[:, None] & (t < stride))


@_tuned(["features"], [(4, 1), (8, 1), (2, 1)])
@triton.jit
def transpose_back_kernel(
    source, places, out, tokens, features, stride, windows,
    K: tl.constexpr, GATHER: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes rows of source, transposed, to out (tokens, features): row i for feature i, or with GATHER row places[i].

    TWICE: source holds inputs in overlapping windows; an input that the next window has too becomes the sum.
    """
    tiles = tl.cdiv(features, BLOCK)
    program = tl.program_id(0)
    t = (program // tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    c = (program % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    place = c
    if GATHER:
        place = tl.load(places + c, mask=c < features, other=0).to(tl.int64)
    tile = tl.load(source + place[:, None] * stride + t, mask=(c < features)[:, None] & (t < stride), other=0.0)
    if TWICE:
        # Windows begin at ⌈i(n − K)/(windows − 1)⌉, as sizes.window_starts: finds the input's place in the next one.
        window = place // K
        span = features - K
        start = (window * span + windows - 2) // (windows - 1)
        following = ((window + 1) * span + windows - 2) // (windows - 1)
        slot = place - window * K + start - following
        second = (window + 1) * K + slot
        both = (c < features) & (window + 1 < windows) & (slot >= 0)
        more = tl.load(source + second[:, None] * stride + t, mask=both[:, None] & (t < stride), other=0.0)
        tile = (tile.to(tl.float32) + more.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + t[:, None] * features + c, tl.trans(tile), mask=(t < tokens)[:, None] & (c < features))


@_tuned(["m", "R", "K"], [(4, 3), (4, 2), (8, 3), (8, 2)])
@triton.jit
def outputs_kernel(
    inputs, values, window_inputs, out, stride, m, windows, shift,
    R: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[o, t] = Σ_c values[o, c] · inputs[input c of o's window, t], for all outputs o."""
    # Tiles of one window and the same tokens next to each other: they read the same inputs.
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    blocks = tl.cdiv(stride, BLOCK_T)
    program = tl.program_id(0)
    run = program // (tiles * blocks)
    window = (run + shift) % windows
    t = program // tiles % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    q = _first_output(run, m, windows) + program % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    used = q < _first_output(run + 1, m, windows)
    o = q.to(tl.int64)[:, None]

    total = tl.zeros([BLOCK_R, BLOCK_T], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        feature = tl.load(window_inputs + window * K + c, mask=c < K, other=0).to(tl.int64)[:, None]
        x = tl.load(inputs + feature * stride + t, mask=(c < K)[:, None] & (t < stride), other=0.0)
        v = tl.load(values + o * K + c, mask=used[:, None] & (c < K), other=0.0)
        total = _multiply_add(v.to(x.dtype), x, total, PRECISION)
    tl.store(out + o * stride + t, total.to(out.dtype.element_ty), mask=used[:, None] & (t < stride))


@_tuned(["m", "R", "K"], [(4, 3), (4, 2), (8, 3), (8, 2)])
@triton.jit
def inputs_kernel(
    grads, values, base, out, stride, m, windows, shift,
    R: tl.constexpr, K: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[i·K + c, t] = base there + Σ_o values[o, c] · grads[o, t], over the outputs o of window i."""
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks = tl.cdiv(stride, BLOCK_T)
    program = tl.program_id(0)
    window = program // (tiles * blocks)
    t = program // tiles % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    c = program % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    run = (window + windows - shift) % windows
    first = _first_output(run, m, windows)
    last = _first_output(run + 1, m, windows)

    total = tl.zeros([BLOCK_K, BLOCK_T], dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        q = first + start + tl.arange(0, BLOCK_R)
        used = (q < last)[:, None]
        o = q.to(tl.int64)[:, None]
        g = tl.load(grads + o * stride + t, mask=used & (t < stride), other=0.0)
        v = tl.load(values + o * K + c, mask=used & (c < K), other=0.0)
        total = _multiply_add(tl.trans(v.to(g.dtype)), g, total, PRECISION)

    place = (window * K + c).to(tl.int64)[:, None] * stride + t
    mask = (c < K)[:, None] & (t < stride)
    if ADD:
        total += tl.load(base + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@_tuned(["m", "R", "K"], [(4, 3), (4, 2), (8, 3), (8, 2)])
@triton.jit
def values_kernel(
    grads, inputs, window_inputs, partial, stride, chunk, m, windows, shift,
    R: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[part, o, c] = Σ_t grads[o, t] · inputs[input c of o's window, t], over the tokens of a chunk."""
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R * tiles_k
    program = tl.program_id(0)
    run = program // tiles % windows
    window = (run + shift) % windows
    part = program // (tiles * windows)
    q = _first_output(run, m, windows) + program % tiles // tiles_k * BLOCK_R + tl.arange(0, BLOCK_R)
    c = program % tiles % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    used = q < _first_output(run + 1, m, windows)
    o = q.to(tl.int64)[:, None]
    feature = tl.load(window_inputs + window * K + c, mask=c < K, other=0).to(tl.int64)[:, None]

    total = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for start in range(part * chunk, min(part * chunk + chunk, stride), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        g = tl.load(grads + o * stride + t, mask=used[:, None] & (t < stride), other=0.0)
        x = tl.load(inputs + feature * stride + t, mask=(c < K)[:, None] & (t < stride), other=0.0)
        total = _multiply_add(g, tl.trans(x), total, PRECISION)
    place = part.to(tl.int64) * m * K + o * K + c
    tl.store(partial + place, total.to(partial.dtype.element_ty), mask=used[:, None] & (c < K))


@triton.jit
def _finalise(h):
    """Applies MurmurHash3's 32-bit finaliser (Appleby, public domain), as stratified.murmur_finalise."""
    h = (h ^ (h >> 16)) * tl.full([], _MURMUR_1, tl.uint32)
    h = (h ^ (h >> 13)) * tl.full([], _MURMUR_2, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _stratified_column(key, i, j, n, k):
    """Returns the columns of slots j of rows i, as stratified.stratified_column; key and i are taken modulo 2^32."""
    word = _finalise(key.to(tl.uint32) + i.to(tl.uint32) * tl.full([], _ROW_STEP, tl.uint32))
    word = _finalise(word + j.to(tl.uint32) * tl.full([], _SLOT_STEP, tl.uint32))
    wide = j.to(tl.int64) * n
    start = (wide // k).to(tl.int32)
    size = ((wide + n) // k).to(tl.int32) - start
    return start + tl.umulhi(word, size.to(tl.uint32)).to(tl.int32)


@triton.jit(do_not_specialize=["first"])
def stratified_kernel(matrix, values, key, first, count, n, k, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
    """Adds values (rows, k) to matrix (rows, n), which begins at row `first`, or copies them out of it."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = slot < count
    row = slot // k
    column = _stratified_column(tl.load(key), row + first, (slot - row * k).to(tl.int32), n, k)
    place = matrix + row * n + column
    entry = tl.load(place, mask=live, other=0.0)
    if SCATTER:
        value = tl.load(values + slot, mask=live, other=0.0).to(entry.dtype)
        total = (entry.to(tl.float32) + value.to(tl.float32)).to(entry.dtype)
        tl.store(place, total, mask=live)
    else:
        tl.store(values + slot, entry.to(values.dtype.element_ty), mask=live)
