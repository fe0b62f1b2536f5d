"""Triton kernels for CUDA: the products of `blocks`, and the scatter and gather of `stratified`.

:mod:`.torch_kernels` launches the kernels and documents their arguments.

`blocks`. Matrices are read and written as they lie, tokens × features: no transposed or permuted copy is made. The
inputs of a window are gathered by the loads of the products, and the gradient of the inputs is scattered by their
stores. Because inputs are permuted in groups of neighbours, an access is of up to 16 bytes. Tiles of the same tokens
run next to each other, so that the cache serves all windows of a token after the first.

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
def _first_output(run, m, windows, UNIT: tl.constexpr):
    """Returns the first output of a run, as sizes.first_output."""
    units = (m + UNIT - 1) // UNIT
    return tl.minimum(m, (run * (units // windows) + tl.minimum(run, units % windows)) * UNIT)


@triton.jit
def _run_of(output, m, windows, UNIT: tl.constexpr):
    """Returns the run of an output."""
    units = (m + UNIT - 1) // UNIT
    each = units // windows
    longer = units % windows
    unit = output // UNIT
    after = unit - longer * (each + 1)  # units after the longer runs
    return tl.where(after < 0, unit // (each + 1), longer + after // tl.maximum(each, 1))


@triton.jit
def _window_start(window, n, windows, K: tl.constexpr, GROUP: tl.constexpr):
    """Returns the first permuted input of a window, as sizes.window_starts."""
    gaps = tl.maximum(windows - 1, 1)
    return (window * ((n - K) // GROUP) + gaps - 1) // gaps * GROUP


@triton.jit
def _last_window(place, n, windows, K: tl.constexpr, GROUP: tl.constexpr):
    """Returns the last window that contains a permuted input: the last one whose start is not beyond it."""
    steps = tl.maximum((n - K) // GROUP, 1)
    return tl.minimum(place // GROUP * (windows - 1) // steps, windows - 1)


@triton.jit
def _first_window(place, n, windows, K: tl.constexpr, GROUP: tl.constexpr):
    """Returns the first window that contains a permuted input: the first one that ends behind it."""
    steps = tl.maximum((n - K) // GROUP, 1)
    start = (tl.maximum(place - K + 1, 0) + GROUP - 1) // GROUP  # the least start that reaches it, in steps
    return tl.where(start > 0, tl.minimum((start - 1) * (windows - 1) // steps + 1, windows - 1), 0)


@triton.jit
def _load_inputs(pointers, mask, GROUP: tl.constexpr):
    """Loads numbers of inputs, of which GROUP at a time are neighbours that begin at a multiple of GROUP."""
    inputs = tl.load(pointers, mask=mask, other=0)
    if GROUP > 1:
        inputs = tl.max_contiguous(tl.multiple_of(inputs, GROUP), GROUP)
    return inputs


@_tuned(["m", "n", "K", "RANK"], [(8, 3), (4, 3), (8, 4), (4, 4)])
@triton.jit
def outputs_kernel(
    x, V, window_inputs, h, B, y, tokens, m, windows, shift,
    PITCH_X: tl.constexpr, PITCH_H: tl.constexpr, PITCH_Y: tl.constexpr,
    K: tl.constexpr, RANK: tl.constexpr, ADD: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[t, o] = y[t, o] if ADD + Σ_j h[t, j] · B[o, j] + Σ_c x[t, input c of o's window] · V[o, c]."""
    blocks = tl.cdiv(m, BLOCK_O)
    first = tl.program_id(0) % blocks * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    t = (tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    live = t < tokens
    row = o.to(tl.int64)[None, :]

    total = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for start in range(0, RANK, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        left = tl.load(h + t * PITCH_H + j, mask=live & (j < RANK), other=0.0)
        right = tl.load(B + row * RANK + j[:, None], mask=(o < m) & (j < RANK)[:, None], other=0.0)
        total = _multiply_add(left, right.to(left.dtype), total, PRECISION)

    # Where a tile lies in several runs, its other outputs are multiplied by zeros.
    last = tl.minimum(first + BLOCK_O, m) - 1
    for run in range(_run_of(first, m, windows, UNIT), _run_of(last, m, windows, UNIT) + 1):
        window = (run + shift) % windows
        used = (o >= _first_output(run, m, windows, UNIT)) & (o < _first_output(run + 1, m, windows, UNIT))
        for start in range(0, K, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            feature = _load_inputs(window_inputs + window * K + c, c < K, GROUP)
            left = tl.load(x + t * PITCH_X + feature, mask=live & (c < K), other=0.0)
            right = tl.load(V + row * K + c[:, None], mask=used & (c < K)[:, None], other=0.0)
            total = _multiply_add(left, right.to(left.dtype), total, PRECISION)

    place = y + t * PITCH_Y + o
    mask = live & (o < m)
    if ADD:
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(y.dtype.element_ty), mask=mask)


@_tuned(["m", "n", "K", "RANK"], [(8, 3), (4, 3), (8, 4), (4, 4)])
@triton.jit
def inputs_kernel(
    g, V, window_inputs, q, A, dx, tokens, m, n, windows, shift,
    PITCH_G: tl.constexpr, PITCH_Q: tl.constexpr, PITCH_A: tl.constexpr, PITCH_X: tl.constexpr,
    K: tl.constexpr, RANK: tl.constexpr, ADD: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx[t, i] = dx[t, i] if ADD + Σ_j q[t, j] · A[j, i] + Σ_o g[t, o] · V[o, slot of i], for outputs o that use i."""
    blocks = tl.cdiv(n, BLOCK_C)
    first = tl.program_id(0) % blocks * BLOCK_C
    place = first + tl.arange(0, BLOCK_C)  # in the order of the windows
    t = (tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    live = t < tokens
    held = tl.minimum(place, n - 1)
    holder = _last_window(held, n, windows, K, GROUP)
    held += holder * K - _window_start(holder, n, windows, K, GROUP)
    feature = _load_inputs(window_inputs + held, place < n, GROUP)

    total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for start in range(0, RANK, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        left = tl.load(q + t * PITCH_Q + j, mask=live & (j < RANK), other=0.0)
        rows = j.to(tl.int64)[:, None]
        right = tl.load(A + rows * PITCH_A + feature, mask=(j < RANK)[:, None] & (place < n), other=0.0)
        total = _multiply_add(left, right.to(left.dtype), total, PRECISION)

    # Windows overlap, and a tile may lie in several: each adds to its own inputs, the others are multiplied by zeros.
    last = tl.minimum(first + BLOCK_C, n) - 1
    for window in range(_first_window(first, n, windows, K, GROUP), _last_window(last, n, windows, K, GROUP) + 1):
        slot = place - _window_start(window, n, windows, K, GROUP)
        inside = (slot >= 0) & (slot < K) & (place < n)
        run = (window + windows - shift) % windows
        begin = tl.multiple_of(_first_output(run, m, windows, UNIT), UNIT)
        end = _first_output(run + 1, m, windows, UNIT)
        for start in range(begin, end, BLOCK_K):
            o = start + tl.arange(0, BLOCK_K)
            left = tl.load(g + t * PITCH_G + o, mask=live & (o < end), other=0.0)
            rows = o.to(tl.int64)[:, None]
            right = tl.load(V + rows * K + slot, mask=(o < end)[:, None] & inside, other=0.0)
            total = _multiply_add(left, right.to(left.dtype), total, PRECISION)

    target = dx + t * PITCH_X + feature
    mask = live & (place < n)
    if ADD:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(dx.dtype.element_ty), mask=mask)


@_tuned(["m", "n", "K"], [(4, 3), (4, 2), (8, 3), (8, 4)])
@triton.jit
def values_kernel(
    g, x, window_inputs, partial, tokens, chunk, m, windows, shift,
    PITCH_G: tl.constexpr, PITCH_X: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[part, o, c] = Σ_t g[t, o] · x[t, input c of o's window], over the tokens of a chunk."""
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R * tiles_k
    program = tl.program_id(0)
    run = program // tiles % windows
    window = (run + shift) % windows
    part = program // (tiles * windows)
    begin = tl.multiple_of(_first_output(run, m, windows, UNIT), UNIT)
    o = begin + program % tiles // tiles_k * BLOCK_R + tl.arange(0, BLOCK_R)
    c = program % tiles % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    used = o < _first_output(run + 1, m, windows, UNIT)
    feature = _load_inputs(window_inputs + window * K + c, c < K, GROUP)

    total = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for start in range(part * chunk, min(part * chunk + chunk, tokens), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        left = tl.load(g + t * PITCH_G + o, mask=(t < tokens) & used, other=0.0)
        right = tl.load(x + t * PITCH_X + feature, mask=(t < tokens) & (c < K), other=0.0)
        total = _multiply_add(tl.trans(left), right, total, PRECISION)
    rows = o.to(tl.int64)[:, None]
    place = partial + part.to(tl.int64) * m * K + rows * K + c
    tl.store(place, total.to(partial.dtype.element_ty), mask=used[:, None] & (c < K))


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
