"""What the path factored allocates (no torch): sparse_lowrank/factored.py, supports and kernels, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sltrain_dist.memory.gradients import Parameter, Sink
from sltrain_dist.memory.operands import CASTS, LOW_RANK, OUTPUT_GRADIENTS, SPARSE, Call, Linear, OperatorTape
from sltrain_dist.memory.tape import Buffer
from sltrain_dist.sparse_lowrank.layout import num_windows

_ALIGN = 16
"""Tokens are padded to a multiple of this by sparse_lowrank/kernels.py."""


@dataclass
class _Values:
    """Gradients of the values in float32, and what else lives at the end of the sparse products."""

    gradients: list[Buffer]
    temporary: list[Buffer]


class FactoredTape(OperatorTape):
    """Goes through layers that are applied together, to one input."""

    def _inner(self, layers: Sequence[Linear], component: str) -> Buffer:
        """`_inner`: h = s·xAᵀ of all layers, with their A stacked."""
        stacked = self._stacked(layers)
        h = self.tape.new(component, self.tokens * sum(layer.rank for layer in layers) * self.widths.compute)
        self.tape.drop(stacked)
        return h

    def _stacked(self, layers: Sequence[Linear]) -> Buffer | None:
        sizes = [layer.rank * layer.n * self.widths.compute for layer in layers]
        casts = [self.tape.new(CASTS, size) for size in sizes] if self.widths.casts else []
        if len(layers) == 1:
            return casts[0] if casts else None
        stacked = self.tape.new(LOW_RANK, sum(sizes))
        self.tape.drop(*casts)
        return stacked

    def _direct(self, layer: Linear) -> bool:
        """Whether the products are BlockSupport's own, not the kernels': their results are written where they belong,
        and arranged inputs are saved in x's place (`Products.keeps_arranged`)."""
        return layer.support == "blocks" and not self.device.kernels

    def factored_forward(self, layers: Sequence[Linear], flat: Buffer, out: str, call: Call) -> list[Buffer]:
        tape, t, w = self.tape, self.tokens, self.widths.compute
        plain = self.dequantized(layers)
        call.hidden.append(self._inner(layers, "activations.low_rank"))
        sparse = self._weights(layers)
        sliced = self._slice(layers[0]) < t
        kept = self._direct(layers[0])
        outputs = [tape.new(out, t * layer.m * w) for layer in layers] if sliced else []
        arranged = self._arrange(layers[0], "activations.arranged" if kept else SPARSE)
        for layer in layers:
            if kept:  # written where it belongs
                outputs.append(tape.new(out, t * layer.m * w))
                continue
            product = tape.new(SPARSE, layer.m * self._padded(layer) * w)
            self._sum_rows(layer, layer.m)
            if not sliced:
                outputs.append(tape.new(out, t * layer.m * w))
            tape.drop(product)
        if sliced:
            tape.brief(SPARSE, arranged.size)  # the next slice's, before this one's is gone
        tape.drop(*sparse)
        if kept:
            call.hidden.append(arranged)
            call.arranged = True
        else:
            tape.drop(arranged)
        if self.widths.casts:
            tape.brief(CASTS, max(layer.m * layer.rank for layer in layers) * w)
        tape.drop(*plain)
        return outputs

    def _arrange(self, layer: Linear, component: str) -> Buffer:
        """`arrange_inputs`."""
        transposed = self.tape.new(SPARSE, layer.n * self.tokens * self.widths.compute) if self._twice(layer) else None
        arranged = self.tape.new(component, self._arranged_inputs(layer))
        self.tape.drop(transposed)
        return arranged

    def _twice(self, layer: Linear) -> bool:
        """Whether features are picked from a transposed copy: `blocks.by_features`."""
        return self._direct(layer) and self.widths.compute == 2

    def factored_backward(
        self, layers: Sequence[Linear], grads: Sequence[Buffer], call: Call | None, sink: Sink
    ) -> Buffer:
        """`factored_backward`; without a call, of a layer whose forward pass has built W."""
        tape, t, w, n = self.tape, self.tokens, self.widths.compute, layers[0].n
        plain = self.dequantized(layers)
        kept = call is not None and call.arranged
        values = self._sparse_backward(layers, arranged=kept)
        picked = tape.new(SPARSE, t * n * w) if self._twice(layers[0]) else None
        dx = tape.new(OUTPUT_GRADIENTS, t * n * w)
        tape.drop(picked)
        if self._slice(layers[0]) < t:
            tape.brief(SPARSE, self._arranged_inputs(layers[0]))
        tape.drop(*values.temporary)
        ranks = sum(layer.rank for layer in layers)
        q = tape.new(LOW_RANK, t * ranks * w)
        if self.widths.casts:
            tape.brief(CASTS, max(layer.m * layer.rank for layer in layers) * w)
        tape.drop(self._stacked(layers))
        component = CASTS if self.widths.casts else "gradients"
        by_window = tape.new(LOW_RANK, ranks * self._places_of_inputs(layers[0]) * w) if kept else None
        dA = tape.new(component, ranks * n * w)
        tape.drop(by_window)
        h = self._inner(layers, LOW_RANK) if call is None else None
        dB = [tape.new(component, layer.m * layer.rank * w) for layer in layers]
        arrived: list[tuple[Parameter, Buffer]] = []
        wide = self.widths.parameter
        for layer, B, V in zip(layers, dB, values.gradients, strict=True):
            if self.widths.casts:
                B_wide = tape.new("gradients", layer.m * layer.rank * wide)
                A_wide = tape.new("gradients", layer.rank * n * wide)
                arrived += [(layer.parameters[0], B_wide), (layer.parameters[1], A_wide)]
            else:
                arrived += [(layer.parameters[0], B), (layer.parameters[1], tape.keep(dA))]
            V_own = V if wide == 4 else tape.new("gradients", layer.nnz * wide)
            arrived.append((layer.parameters[2], V_own))
        if wide != 4:
            tape.drop(*values.gradients)
        if self.widths.casts:
            tape.drop(*dB)
        tape.drop(q, h, dA, *grads, *plain)
        if call is not None:
            tape.drop(*call.hidden, *call.inputs)
        sink.arrive(tape, arrived)
        return dx

    def _sparse_backward(self, layers: Sequence[Linear], *, arranged: bool) -> _Values:
        """`_sparse_backward`, of one slice of tokens: the values' gradients in float32, and what still lives."""
        tape, w = self.tape, self.widths.compute
        sparse = self._weights(layers, transposed=True)
        if layers[0].support != "blocks":
            sparse += self._places(layers)
        inputs = None if arranged else self._arrange(layers[0], SPARSE)
        total: Buffer | None = None
        outputs: Buffer | None = None
        gradients = []
        direct = self._direct(layers[0])
        for layer in layers:
            if not direct or self._twice(layer):
                transposed = tape.new(SPARSE, layer.m * self._padded(layer) * w)
                tape.drop(outputs)
                outputs = transposed
            narrow = tape.new(SPARSE, w * layer.nnz) if direct and w == 2 else None
            gradients.append(tape.new("gradients", 4 * layer.nnz))
            tape.drop(narrow)
            if layer.support != "blocks" and w == 2:
                tape.brief(SPARSE, 2 * layer.nnz)
            if direct and total is not None:  # added to in place
                continue
            made = tape.new(SPARSE, self._windows(layer))
            self._sum_rows(layer, layer.n)
            tape.drop(total)
            total = made
        return _Values(gradients, [b for b in (inputs, outputs, total, *sparse) if b is not None])

    def _arranged_inputs(self, layer: Linear) -> int:
        if self._direct(layer):
            return self._windows(layer)
        return layer.n * self._padded(layer) * self.widths.compute

    def _windows(self, layer: Linear) -> int:
        """Bytes of arranged inputs, and of their gradients before inputs that two windows have are summed."""
        return self._places_of_inputs(layer) * self._padded(layer) * self.widths.compute

    def _places_of_inputs(self, layer: Linear) -> int:
        return num_windows(layer.n, layer.k) * layer.k if layer.support == "blocks" else layer.n

    def _slice(self, layer: Linear) -> int:
        """Tokens at a time: all for `blocks`, `Support.step` for scattered positions."""
        return self.tokens if layer.support == "blocks" else 1024 // self.widths.compute

    def _padded(self, layer: Linear) -> int:
        if layer.support == "blocks" and self.device.kernels:
            return -(-self.tokens // _ALIGN) * _ALIGN
        return min(self.tokens, self._slice(layer))

    def _weights(self, layers: Sequence[Linear], *, transposed: bool = False) -> list[Buffer]:
        """`weights`, or `transposed_weights`, of all layers: positions, and values in the compute type."""
        tape, w, made = self.tape, self.widths.compute, []
        for layer in layers:
            values = tape.new(CASTS, layer.nnz * w) if self.widths.casts else None
            if layer.support != "blocks":
                made += self._transposed(layer, values) if transposed else self._by_row(layer, values)
                continue
            if values is not None:
                made.append(values)
        return made

    def _places(self, layers: Sequence[Linear]) -> list[Buffer]:
        """`places` of all layers, that are not `blocks`: rows, columns, and where rows begin."""
        made = []
        for layer in layers:
            made += [*self._rows_and_columns(layer), self._first_of_each(layer.m)]
        return made

    def _by_row(self, layer: Linear, values: Buffer | None) -> list[Buffer]:
        rows, columns = self._rows_and_columns(layer)
        offsets = self._first_of_each(layer.m)
        self.tape.drop(rows)
        return [buffer for buffer in (columns, offsets, values) if buffer is not None]

    def _transposed(self, layer: Linear, values: Buffer | None) -> list[Buffer]:
        tape = self.tape
        rows, columns = self._rows_and_columns(layer)
        in_order, order = tape.new(SPARSE, 4 * layer.nnz), tape.new(SPARSE, 8 * layer.nnz)
        tape.drop(columns)
        made = [tape.new(SPARSE, 4 * layer.nnz), self._first_of_each(layer.n)]
        made.append(tape.new(SPARSE, self.widths.compute * layer.nnz))
        tape.drop(rows, in_order, order, values)
        return made

    def _rows_and_columns(self, layer: Linear) -> tuple[Buffer, Buffer]:
        """`_rows_and_columns`: int32, a value each."""
        tape, size = self.tape, 4 * layer.nnz
        if layer.support == "random":
            numbers, of_values = tape.new(SPARSE, 4 * layer.m), tape.new(SPARSE, size)
            rows = tape.new(SPARSE, size)
            tape.drop(of_values)
            columns = tape.new(SPARSE, size)
            tape.drop(numbers)
            return rows, columns
        flat = self.positions(layer, layer.m)
        narrow = tape.new(SPARSE, size)
        tape.drop(flat)
        rows, starts, columns = (tape.new(SPARSE, size) for _ in range(3))
        tape.drop(narrow, starts)
        return rows, columns

    def _sum_rows(self, layer: Linear, bags: int) -> None:
        """What torch's embedding_bag returns beside its sums: every index' bag, and two numbers a bag."""
        if layer.support != "blocks":
            self.tape.brief(SPARSE, 4 * layer.nnz + 8 * bags)

    def _first_of_each(self, count: int) -> Buffer:
        numbers, offsets = self.tape.new(SPARSE, 4 * count), self.tape.new(SPARSE, 4 * count)
        self.tape.drop(numbers)
        return offsets
