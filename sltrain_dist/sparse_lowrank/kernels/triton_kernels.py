"""Triton kernels for CUDA: the products of `blocks`, and the scatter and gather of `stratified`.

:mod:`.torch_kernels` launches the kernels and documents their arguments.

`blocks`. Only the inputs are permuted, so only they are transposed. Reading permuted features of a row-major matrix
inside a product would move a 32-byte sector for every 2-byte element, and so cost as much as the dense layer (and
Triton has no gather from shared memory: its own becomes thousands of shuffles). In xᵀ, features × tokens, permuting is
choosing rows and costs nothing: it is fused into the loads of the products. Layers that share an input share xᵀ, and
the gradient of xᵀ is transposed back once for all of them. Transposed matrices have their tokens padded with zeros to
a multiple of 16, so that every access to them is of 16 bytes, whatever T.

The outputs are in their own order, so y is written and g is read as they lie, tokens × features, also by the matrix
products of the low-rank part. A run of outputs may begin anywhere. Its gradients are loaded from the multiple of 8 in
front of it, so that accesses are of 16 bytes; outputs of other runs in these loads are multiplied by zeros.

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


@triton.jit
def _run_of(output, m, windows):
    """Returns the run of an output."""
    each = m // windows
    longer = m % windows  # runs of each + 1 outputs, which come first
    after = output - longer * (each + 1)
    return tl.where(after < 0, output // (each + 1), longer + after // tl.maximum(each, 1))


@_tuned(["features"], [(4, 1), (8, 1), (2, 1)])
@triton.jit
def transpose_kernel(x, out, tokens, features, pitch, stride, BLOCK: tl.constexpr):
    """Writes x (tokens, features) transposed to out (features, stride), zeros in columns tokens … stride − 1."""
    tiles = tl.cdiv(features, BLOCK)
    program = tl.program_id(0)
    t = (program // tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    c = (program % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    tile = tl.load(x + t[:, None] * pitch + c, mask=(t < tokens)[:, None] & (c < features), other=0.0)
    tl.store(out + c[:, None] * stride + t, tl.trans(tile), mask=(c < features)[:, None] & (t < stride))


@_tuned(["features"], [(4, 1), (8, 1), (2, 1)])
@triton.jit
def restore_kernel(
    source, places, base, out, tokens, features, pitch, stride, windows,
    K: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t, i] = base[t, i] + source[places[i], t]; rows of out are `features` long, those of base `pitch` apart.

    TWICE: source holds inputs in overlapping windows; if the next window has the input too, that is added as well.
    """
    tiles = tl.cdiv(features, BLOCK)
    program = tl.program_id(0)
    t = (program // tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    c = (program % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    place = tl.load(places + c, mask=c < features, other=0).to(tl.int64)
    tile = tl.load(source + place[:, None] * stride + t, mask=(c < features)[:, None] & (t < stride), other=0.0)
    total = tile.to(tl.float32)
    if TWICE:
        # Windows begin at ⌈i(n − K)/(windows − 1)⌉, as sizes.window_starts: finds the input's place in the next one.
        window = place // K
        span = features - K
        start = (window * span + windows - 2) // (windows - 1)
        following = ((window + 1) * span + windows - 2) // (windows - 1)
        slot = place - window * K + start - following
        second = (window + 1) * K + slot
        both = (c < features) & (window + 1 < windows) & (slot >= 0)
        total += tl.load(source + second[:, None] * stride + t, mask=both[:, None] & (t < stride), other=0.0)
    mask = (t < tokens)[:, None] & (c < features)
    before = tl.load(base + t[:, None] * pitch + c, mask=mask, other=0.0)
    total = tl.trans(total) + before.to(tl.float32)
    tl.store(out + t[:, None] * features + c, total.to(out.dtype.element_ty), mask=mask)


# The loads of inputs depend on those of their numbers, so that five stages load two steps ahead, and three load one.
@_tuned(["m", "K", "RANK"], [(8, 3), (4, 3), (8, 5), (4, 5)])
@triton.jit
def outputs_kernel(
    inputs, V, window_inputs, h, B, y, tokens, stride, m, windows, shift,
    PITCH_H: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[t, o] = Σ_j h[t, j] · B[o, j] + Σ_c inputs[input c of o's window, t] · V[o, c]."""
    # Tiles of the same tokens next to each other: they read the same inputs.
    blocks = tl.cdiv(m, BLOCK_O)
    first = tl.program_id(0) % blocks * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    token = t.to(tl.int64)[:, None]
    row = o.to(tl.int64)[None, :]

    total = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for start in range(0, RANK, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        left = tl.load(h + token * PITCH_H + j, mask=(token < tokens) & (j < RANK), other=0.0)
        right = tl.load(B + row * RANK + j[:, None], mask=(o < m) & (j < RANK)[:, None], other=0.0)
        total = _multiply_add(left, right.to(left.dtype), total, PRECISION)

    # A tile may lie in several runs: outputs of the others are multiplied by zeros.
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    run = _run_of(first, m, windows)
    steps = (_run_of(tl.minimum(first + BLOCK_O, m) - 1, m, windows) + 1 - run) * tiles
    for step in range(0, steps):
        this = run + step // tiles
        c = step % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
        used = (o >= _first_output(this, m, windows)) & (o < _first_output(this + 1, m, windows))
        feature = tl.load(window_inputs + (this + shift) % windows * K + c, mask=c < K, other=0).to(tl.int64)[:, None]
        x = tl.load(inputs + feature * stride + t, mask=(c < K)[:, None] & (t < stride), other=0.0)
        v = tl.load(V + row * K + c[:, None], mask=used & (c < K)[:, None], other=0.0)
        total = _multiply_add(tl.trans(x), v.to(x.dtype), total, PRECISION)
    tl.store(y + token * m + o, total.to(y.dtype.element_ty), mask=(token < tokens) & (o < m))


@_tuned(["m", "K", "PITCH"], [(8, 3), (4, 3), (8, 4), (4, 4)])
@triton.jit
def inputs_kernel(
    g, V, base, out, tokens, stride, m, windows, shift,
    PITCH: tl.constexpr, K: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[i·K + c, t] = base there if ADD + Σ_o V[o, c] · g[t, o], over the outputs o of window i."""
    # Tiles of one window and the same tokens next to each other: they read the same gradients.
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks = tl.cdiv(stride, BLOCK_T)
    program = tl.program_id(0)
    window = program % (tiles * windows) // tiles
    t = program // (tiles * windows) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    token = t.to(tl.int64)[:, None]
    c = program % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    run = (window + windows - shift) % windows
    first = _first_output(run, m, windows)
    last = _first_output(run + 1, m, windows)

    # Tokens first, because the first side of a tensor core's tile is at least 64, and windows may be shorter.
    total = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    for start in range(first // 8 * 8, last, BLOCK_R):
        o = tl.multiple_of(start, 8) + tl.arange(0, BLOCK_R)
        grads = tl.load(g + token * PITCH + o, mask=(token < tokens) & (o < PITCH), other=0.0)
        used = ((o >= first) & (o < last))[:, None]
        v = tl.load(V + o.to(tl.int64)[:, None] * K + c, mask=used & (c < K), other=0.0)
        total = _multiply_add(grads, v.to(grads.dtype), total, PRECISION)

    total = tl.trans(total)
    place = (window * K + c).to(tl.int64)[:, None] * stride + t
    mask = (c < K)[:, None] & (t < stride)
    if ADD:
        total += tl.load(base + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@_tuned(["m", "K", "PITCH"], [(4, 3), (4, 4), (8, 3)])
@triton.jit
def values_kernel(
    g, inputs, window_inputs, partial, tokens, stride, chunk, m, windows, shift,
    PITCH: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[part, o, c] = Σ_t g[t, o] · inputs[input c of o's window, t], over the tokens of a chunk."""
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R * tiles_k
    program = tl.program_id(0)
    run = program // tiles % windows
    window = (run + shift) % windows
    part = program // (tiles * windows)
    first = _first_output(run, m, windows)
    last = _first_output(run + 1, m, windows)
    begin = tl.multiple_of(first // 8 * 8, 8) + program % tiles // tiles_k * BLOCK_R
    o = begin + tl.arange(0, BLOCK_R)
    c = program % tiles % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    feature = tl.load(window_inputs + window * K + c, mask=c < K, other=0).to(tl.int64)[:, None]

    total = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    end = tl.where(begin < last, min(part * chunk + chunk, stride), 0)  # a run may end before its last tile
    for start in range(part * chunk, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        token = t.to(tl.int64)[:, None]
        grads = tl.load(g + token * PITCH + o, mask=(token < tokens) & (o < PITCH), other=0.0)
        x = tl.load(inputs + feature * stride + t, mask=(c < K)[:, None] & (t < stride), other=0.0)
        total = _multiply_add(tl.trans(grads), tl.trans(x), total, PRECISION)
    used = ((o >= first) & (o < last))[:, None]
    place = partial + part.to(tl.int64) * m * K + o.to(tl.int64)[:, None] * K + c
    tl.store(place, total.to(partial.dtype.element_ty), mask=used & (c < K))


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
