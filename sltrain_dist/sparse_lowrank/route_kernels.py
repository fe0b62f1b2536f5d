"""The kernels that each route of a layer runs (no torch): their FLOPs, bytes and launches, for the cost model.

The lists follow paths/ and supports/ operator by operator, as they run without torch.compile; a test compares them with
a trace. They are those of layers without bias whose parameters have the type that is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from sltrain_dist.config.schema import ReparamConfig, SupportKind
from sltrain_dist.sparse_lowrank.devices import Device, Unit
from sltrain_dist.sparse_lowrank.sizes import (
    BLOCK_SLICE,
    SLICE,
    TOKEN_ALIGNMENT,
    is_fused,
    nonzeros,
    num_windows,
    position_bytes,
    rows_are_aligned,
    window_runs,
)

TRITON_LAUNCHES = 5
"""Launches that starting a Triton kernel counts as: custom operators and Triton's launcher are Python. Fitted to the
times of q, k, v and o on an H200, which launches bound (linear.json of docs/reports/2026-11-27-h200.md): 4.9 to 5.4."""


class LayerShape(NamedTuple):
    """What a layer's cost depends on: (m, n) of W, the rank, the number of sparse values, and their support.

    `sharing` is the number of layers that are applied to the same input at once, such as 3 for q, k and v.
    """

    m: int
    n: int
    rank: int
    nnz: int
    support: SupportKind
    sharing: int = 1

    @staticmethod
    def of(m: int, n: int, reparam: ReparamConfig, sharing: int = 1) -> LayerShape:
        """Returns the shape of a layer with m outputs and n inputs."""
        nnz = nonzeros(m, n, reparam.density, reparam.support)
        return LayerShape(m, n, reparam.rank, nnz, reparam.support, sharing)


class Kernel(NamedTuple):
    """Kernels of one kind: what runs them, and their FLOPs (two for a multiply-add), bytes and launches in total."""

    name: str
    unit: Unit
    flops: float
    bytes: float
    launches: int = 1


def dense_kernels(m: int, n: int, tokens: int, bits: int, device: Device) -> list[Kernel]:
    """Returns the kernels of `nn.Linear`: y = xWᵀ; dx = gW, dW = gᵀx."""
    return [_product(name, tokens, m, n, bits, device) for name in ("xWᵀ", "gW", "gᵀx")]


def low_rank_kernels(m: int, n: int, rank: int, tokens: int, bits: int, device: Device) -> list[Kernel]:
    """Returns the kernels of `LowRankLinear`: y = s·(xAᵀ)Bᵀ, and the gradients of x, A and B."""
    inner = [_product(name, tokens, n, rank, bits, device) for name in ("xAᵀ", "qA", "qᵀx")]
    outer = [_product(name, tokens, m, rank, bits, device) for name in ("hBᵀ", "gB", "gᵀh")]
    return [*inner, *outer, Kernel("scale", "copy", 0, 2 * 2 * bits // 8 * tokens * m, 2)]


def _product(
    name: str, tokens: int, p: int, q: int, bits: int, device: Device, *, read: int = 0, aligned: bool = False
) -> Kernel:
    """Returns a product of matrices (tokens, p), (p, q) and (tokens, q), of which two are multiplied to the third.

    The tokens may be any dimension that is no row length. `read` are elements of the result that are added to.
    `aligned` says that rows are, whatever their length.
    """
    unaligned = not (device.is_cpu or aligned or (rows_are_aligned(p, bits) and rows_are_aligned(q, bits)))
    moved = bits // 8 * (tokens * p + p * q + tokens * q + read)
    return Kernel(name, "unaligned" if unaligned else "matrix", 2 * tokens * p * q, moved)


class RouteKernels:
    """Lists the kernels of the routes, for all layers together that share an input, as if they were of one shape.

    Args:
        shape: The layer.
        tokens: T, above 0.
        bits: Bits of the type that is computed in.
        device: The device.
    """

    def __init__(self, shape: LayerShape, tokens: int, bits: int, device: Device) -> None:
        self.m, self.n, self.rank, self.nnz, self.support, self.sharing = shape
        self.shape, self.tokens, self.bits, self.width, self.device = shape, tokens, bits, bits // 8, device
        if self.support == "blocks":
            k = self.nnz // self.m
            self.places = num_windows(self.n, k) * k  # inputs of all windows: some lie in two
            self.runs = len(window_runs(self.m, num_windows(self.n, k), 0))
        self.blocks_on_gpu = self.support == "blocks" and not device.is_cpu

    def materialize(self) -> list[Kernel]:
        """Returns the kernels with W built in both passes, and its dense gradient."""
        m, n, r, t = self.m, self.n, self.rank, self.tokens
        each = [
            *self._build(),
            self._product("xWᵀ", t, m, n),
            self._fill("dx", t * n),
            *self._build(),
            self._product("gW", t, m, n, read=t * n),
            self._product("gᵀx", t, m, n),
            self._product("GAᵀ", m, n, r),
            self._pass("scale dB, copy it", 4 * m * r, 2),
            self._fill("dA", r * n),
            self._product("BᵀG", m, r, n, read=r * n),
            self._pass("scale dA", 2 * r * n),
            *self._take(),
            self._pass("copy dV", 2 * self.nnz),
        ]
        return [*self.sharing * each, *self._add_dx()]

    def mixed(self) -> list[Kernel]:
        """Returns the kernels with W built in the forward pass, and the backward pass of factored, layer by layer."""
        m, n, r, t = self.m, self.n, self.rank, self.tokens
        one = RouteKernels(self.shape._replace(sharing=1), t, self.bits, self.device)
        if self.blocks_on_gpu:
            backward = [*one._align("x", t, n), *one._gpu_inner(), *one._gpu_backward()]
        else:
            backward = [*self._scaled("xAᵀ", t, n, r), *one._factored_backward(keeps_arranged=False)]
        each = [*self._build(), self._product("xWᵀ", t, m, n), *backward]
        return [*self.sharing * each, *self._add_dx()]

    def factored(self) -> list[Kernel]:
        """Returns the kernels with nothing of the size of W."""
        m, n, r, t, layers = self.m, self.n, self.rank, self.tokens, self.sharing
        if self.blocks_on_gpu:
            return [*self._align("x", t, n), *self._gpu_inner(), *self._gpu_outputs(), *self._gpu_backward()]
        return [
            *self._stack_A(),
            *self._scaled("xAᵀ", t, n, layers * r),
            *self._sparse_forward(),
            *layers * [self._product("y + hBᵀ", t, r, m, read=t * m)],
            *self._factored_backward(keeps_arranged=self.support == "blocks"),
        ]

    def _factored_backward(self, *, keeps_arranged: bool) -> list[Kernel]:
        m, n, r, t, layers = self.m, self.n, self.rank, self.tokens, self.sharing
        if keeps_arranged:  # the product runs over the inputs of all windows, from which those of x are picked
            pick = self._pass("pick dA", 2 * layers * r * n, unit="pick")
            dA = [self._product("qᵀx", t, layers * r, self.places), pick]
        else:
            dA = [self._product("qᵀx", t, layers * r, n)]
        return [
            *self._sparse_backward(keeps_arranged),
            *layers * [self._product("gB", t, m, r)],
            *self._stack_A(),
            self._product("dx + qA", t, layers * r, n, read=t * n),
            *dA,
            *layers * [self._product("gᵀh", t, m, r)],
        ]

    def _add_dx(self) -> list[Kernel]:
        """Returns autograd's sums of the layers' gradients of x."""
        return (self.sharing - 1) * [self._pass("add up dx", 3 * self.tokens * self.n)]

    def _stack_A(self) -> list[Kernel]:
        """Returns the copy of A of all layers below each other."""
        return [self._pass("stack A", 2 * self.sharing * self.rank * self.n)] if self.sharing > 1 else []

    # W: built, and read at the positions.

    def _build(self) -> list[Kernel]:
        BA = self._scaled("BA", self.m, self.rank, self.n)
        if self._has_kernel_for_positions:
            return [*BA, self._scattered("add at positions", self.width, 2, TRITON_LAUNCHES)]
        return [*BA, *self._positions(), self._scattered("add at positions", self._position + self.width, 2)]

    def _take(self) -> list[Kernel]:
        if self._has_kernel_for_positions:
            return [self._scattered("take at positions", self.width, 1, TRITON_LAUNCHES)]
        return [*self._positions(), self._scattered("take at positions", self._position + self.width, 1)]

    @property
    def _has_kernel_for_positions(self) -> bool:
        return self.support == "stratified" and not self.device.is_cpu

    @property
    def _position(self) -> int:
        """Bytes of a flat position."""
        return position_bytes(self.m, self.n) if self.support == "random" else 8

    def _positions(self) -> list[Kernel]:
        """Returns the passes over all values that compute their flat positions."""
        if self.support == "random":  # each row's start repeated, columns added
            return [self._values("positions", 5 * self._position + 2, 5)]
        if self.support == "blocks":  # int32 windows of all rows, int64 sums
            return [self._values("positions", 8 + 12, 5 + 4 * self.runs)]
        return [self._values("positions", 272, 37)]  # 17 passes over int64

    # The products with S.

    def _sparse_forward(self) -> list[Kernel]:
        layers = self.sharing
        if self.support != "blocks":
            x, y = self._transpose("xᵀ", self.n), self._transpose("y", self.m)
            return [x, *layers * [*self._rows_and_columns(), self._bags("xSᵀ", self.m), y]]
        return [*self._arrange_inputs(), *layers * [self._blocks("xSᵀ", self.runs)]]

    def _sparse_backward(self, keeps_arranged: bool) -> list[Kernel]:
        add = (self.sharing - 1) * [self._pass("add up dxᵀ", self.tokens * self.n)]
        dV = [self._pass("dV", 3 * self.nnz)] if self.bits <= 16 else []  # from or to float32
        if self.support != "blocks":
            places = self._rows_and_columns()
            sorts = self._values("sort by columns", 24 * math.log2(self.nnz + 1) + 28 + 2 * self.width, 4)
            total = self._values("dV", 12 * self._slices, self._slices)
            dots = [self._transpose("gᵀ", self.m), *self._dots(), total, *dV]
            each = [*places, *places, sorts, *dots, self._bags("gS", self.n)]
            add = 2 * add
            return [self._transpose("xᵀ", self.n), *self.sharing * each, *add, self._transpose("dx", self.n)]
        arrange = [] if keeps_arranged else self._arrange_inputs()
        gradients = [self._transpose("gᵀ", self.m)] if self.bits <= 16 else []
        sums = 1 if self.bits <= 16 else -(-self.tokens // BLOCK_SLICE)
        products = [self._blocks("gᵀx at positions", self.runs * sums), self._blocks("gS", self.runs)]
        return [*arrange, *self.sharing * [*gradients, *products, *dV], *add, *self._restore_inputs()]

    @property
    def _sparse_flops(self) -> int:
        return 2 * self.tokens * self.nnz

    # Scattered positions: rows of transposed matrices, a slice of tokens at a time.

    @property
    def _slices(self) -> int:
        return -(-self.tokens // (2 * SLICE // max(2, self.width)))

    @property
    def _rows_bytes(self) -> int:
        """Bytes of as many rows of all tokens as there are values."""
        return self.width * self.tokens * self.nnz

    def _rows_and_columns(self) -> list[Kernel]:
        if self.support == "random":
            return [self._values("rows and columns", 18, 6)]
        return [*self._positions(), self._values("rows and columns", 12 + 8 + 8 + 12, 6)]

    def _transpose(self, name: str, features: int) -> Kernel:
        moved = 2 * self.width * self.tokens * features
        if self.support == "blocks":  # all tokens at once, which the cache does not hold
            return Kernel(name, "pick", 0, moved)
        return Kernel(name, "transpose", 0, moved, self._slices)

    def _bags(self, name: str, features: int) -> Kernel:
        moved = self._rows_bytes + self.width * self.tokens * features
        return Kernel(name, "bags", self._sparse_flops, moved, self._slices)

    def _dots(self) -> list[Kernel]:
        flops, moved = self._sparse_flops, 2 * self._rows_bytes
        if self.device.is_cpu or self.bits > 16:
            return [Kernel("gᵀx at positions", "dots", flops, moved, self._slices)]
        float32 = self._pass("float32", 3 * self.tokens * (self.m + self.n), 2 * self._slices)
        return [float32, Kernel("gᵀx at positions", "dots", flops, 2 * moved, self._slices)]

    # `blocks` on the CPU: features are gathered, from rows of the transpose for 2-byte types.

    def _arrange_inputs(self) -> list[Kernel]:
        if self.bits > 16:
            return [self._pass("pick x", 2 * self.tokens * self.places, unit="pick")]
        return [self._transpose("xᵀ", self.n), self._pass("rows of xᵀ", 2 * self.tokens * self.places)]

    def _restore_inputs(self) -> list[Kernel]:
        overlap = self.places - self.n
        twice = [self._pass("inputs in two windows", 5 * self.tokens * overlap, 3)] if overlap else []
        if self.bits > 16:
            return [self._pass("pick dx", 2 * self.tokens * self.n, unit="pick"), *twice]
        return [self._pass("rows of dxᵀ", 2 * self.tokens * self.n), *twice, self._transpose("dx", self.n)]

    def _blocks(self, name: str, launches: int) -> Kernel:
        moved = self.width * (self.tokens * (self.places + self.m) + self.nnz)
        return Kernel(name, "blocks", self._sparse_flops, moved, launches)

    # `blocks` on CUDA: Triton kernels with transposed inputs, and copies of matrices whose rows are not aligned.

    def _gpu_inner(self) -> list[Kernel]:
        n, rows = self.n, self.sharing * self.rank
        product = self._product("xAᵀ", self.tokens, n, rows, aligned=True)
        return [*self._stack_A(), *self._align("A", rows, n), self._pass("one zero", 1), product]

    def _gpu_outputs(self) -> list[Kernel]:
        t, m, r = self.tokens, self.m, self.rank
        if is_fused(m, r, self.bits):
            each = [self._triton("hBᵀ + xSᵀ", "fused", m * r, t * r + m * r)]
        else:
            each = [self._triton("xSᵀ"), self._product("y + hBᵀ", t, r, m, read=t * m)]
        return [self._transpose_inputs(), *self.sharing * each]

    def _gpu_backward(self) -> list[Kernel]:
        m, n, r, t, layers = self.m, self.n, self.rank, self.tokens, self.sharing
        places = self._padded * self.places
        dV = [self._pass("dV", 3 * self.nnz)] if self.bits <= 16 else []  # from float32
        return [
            *layers * self._align("g", t, m),
            self._transpose_inputs(),
            *layers * [self._triton("gᵀx at positions"), self._values("dV", 8, 1), *dV],
            *layers * [self._product("gB", t, m, r, aligned=True)],
            *self._stack_A(),
            *self._align("A", layers * r, n),
            self._product("qA", t, layers * r, n, aligned=True),
            self._triton("gS"),
            *(layers - 1) * [self._triton("dxᵀ + gS", "blocks", 0, places)],
            self._pass("dx + qA", places + 2 * t * n, TRITON_LAUNCHES),
            self._product("qᵀx", t, layers * r, n, aligned=True),
            *self._compact("dA", layers * r, n),
            *layers * [self._product("gᵀh", t, m, r, aligned=True)],
        ]

    @property
    def _padded(self) -> int:
        return -(-self.tokens // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT

    def _align(self, name: str, rows: int, columns: int) -> list[Kernel]:
        """Returns the copy of a matrix whose rows are not aligned, and the zeros that fill its rows up."""
        return [] if rows_are_aligned(columns, self.bits) else [self._pass(f"align {name}", 2 * rows * columns, 2)]

    def _compact(self, name: str, rows: int, columns: int) -> list[Kernel]:
        """Returns the copy of a matrix from aligned rows to rows one after another."""
        return [] if rows_are_aligned(columns, self.bits) else [self._pass(f"compact {name}", 2 * rows * columns)]

    def _transpose_inputs(self) -> Kernel:
        return self._pass("xᵀ", self.n * (self.tokens + self._padded), TRITON_LAUNCHES)

    def _triton(self, name: str, unit: Unit = "blocks", factor: int = 0, more: int = 0) -> Kernel:
        """Returns a product with S, and with a factor of so many elements; `more` elements move than for S alone."""
        moved = self.width * (self._padded * self.places + self.tokens * self.m + self.nnz + more)
        return Kernel(name, unit, 2 * self.tokens * (self.nnz + factor), moved, TRITON_LAUNCHES)

    # Kernels by their size.

    def _product(self, name: str, tokens: int, p: int, q: int, *, read: int = 0, aligned: bool = False) -> Kernel:
        return _product(name, tokens, p, q, self.bits, self.device, read=read, aligned=aligned)

    def _scaled(self, name: str, tokens: int, p: int, q: int) -> list[Kernel]:
        """Returns a product that is scaled inside, for which a number is written first."""
        return [self._pass("one zero", 1), self._product(name, tokens, p, q)]

    def _pass(self, name: str, elements: int, launches: int = 1, *, unit: Unit = "copy") -> Kernel:
        return Kernel(name, unit, 0, self.width * elements, launches)

    def _fill(self, name: str, elements: int) -> Kernel:
        return self._pass(f"zero {name}", elements)

    def _values(self, name: str, bytes_each: float, launches: int) -> Kernel:
        return Kernel(name, "copy", 0, bytes_each * self.nnz, launches)

    def _scattered(self, name: str, bytes_each: int, accesses: int, launches: int = 1) -> Kernel:
        return self._values(name, bytes_each + accesses * self.device.sector_bytes, launches)


ROUTE_KERNELS: tuple[Callable[[RouteKernels], list[Kernel]], ...] = (
    RouteKernels.materialize,
    RouteKernels.mixed,
    RouteKernels.factored,
)
"""The lists in the order of `cost.ROUTES`."""
