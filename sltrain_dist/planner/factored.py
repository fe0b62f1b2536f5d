"""What the path factored allocates (no torch): sparse_lowrank/factored.py, supports and kernels, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sltrain_dist.planner.gradients import Parameter, Sink
from sltrain_dist.planner.operands import CASTS, LOW_RANK, OUTPUT_GRADIENTS, SPARSE, Call, Linear, OperatorTape
from sltrain_dist.planner.tape import Buffer
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

    def factored_forward(self, layers: Sequence[Linear], flat: Buffer, out: str, call: Call) -> list[Buffer]:
        tape, t, w = self.tape, self.tokens, self.widths.compute
        plain = self.dequantized(layers)
        call.hidden.append(self._inner(layers, "activations.low_rank"))
        sparse = self._weights(layers)
        sliced = self._slice(layers[0]) < t
        outputs = [tape.new(out, t * layer.m * w) for layer in layers] if sliced else []
        arranged = tape.new(SPARSE, self._arranged_inputs(layers[0]))
        for layer in layers:
            product = tape.new(SPARSE, self._arranged_outputs(layer))
            self._sum_rows(layer, layer.m)
            if not sliced:
                outputs.append(tape.new(out, t * layer.m * w))
            tape.drop(product)
        if sliced:
            tape.brief(SPARSE, arranged.size)  # the next slice's, before this one's is gone
        tape.drop(arranged, *sparse)
        if self.widths.casts:
            tape.brief(CASTS, max(layer.m * layer.rank for layer in layers) * w)
        tape.drop(*plain)
        return outputs

    def factored_backward(
        self, layers: Sequence[Linear], grads: Sequence[Buffer], call: Call | None, sink: Sink
    ) -> Buffer:
        """`factored_backward`; without a call, of a layer whose forward pass has built W."""
        tape, t, w, n = self.tape, self.tokens, self.widths.compute, layers[0].n
        plain = self.dequantized(layers)
        values = self._sparse_backward(layers)
        dx = tape.new(OUTPUT_GRADIENTS, t * n * w)
        if self._slice(layers[0]) < t:
            tape.brief(SPARSE, self._arranged_inputs(layers[0]))
        tape.drop(*values.temporary)
        parts = []
        for layer in layers:
            cast = tape.new(CASTS, layer.m * layer.rank * w) if self.widths.casts else None
            parts.append(tape.new(LOW_RANK, t * layer.rank * w))
            tape.drop(cast)
        q = parts[0]
        if len(layers) > 1:
            q = tape.new(LOW_RANK, sum(part.size for part in parts))
            tape.drop(*parts)
        tape.drop(self._stacked(layers))
        component = CASTS if self.widths.casts else "gradients"
        dA = tape.new(component, sum(layer.rank for layer in layers) * n * w)
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

    def _sparse_backward(self, layers: Sequence[Linear]) -> _Values:
        """`_sparse_backward`, of one slice of tokens: the values' gradients in float32, and what still lives."""
        tape = self.tape
        sparse = self._weights(layers, transposed=True)
        if layers[0].support != "blocks" or not self.device.kernels:
            sparse += self._places(layers)
        inputs = tape.new(SPARSE, self._arranged_inputs(layers[0]))
        total: Buffer | None = None
        outputs: Buffer | None = None
        gradients = []
        for layer in layers:
            arranged = tape.new(SPARSE, self._arranged_outputs(layer))
            tape.drop(outputs)
            outputs = arranged
            gradients.append(tape.new("gradients", 4 * layer.nnz))
            if layer.support != "blocks" and self.widths.compute == 2:
                tape.brief(SPARSE, 2 * layer.nnz)
            made = tape.new(SPARSE, self._windows(layer))
            self._sum_rows(layer, layer.n)
            tape.drop(total)
            total = made
        return _Values(gradients, [b for b in (inputs, outputs, total, *sparse) if b is not None])

    def _arranged_inputs(self, layer: Linear) -> int:
        if layer.support == "blocks" and not self.device.kernels:
            return self._windows(layer)
        return layer.n * self._padded(layer) * self.widths.compute

    def _arranged_outputs(self, layer: Linear) -> int:
        rows = layer.m
        if layer.support == "blocks" and not self.device.kernels:
            windows = num_windows(layer.n, layer.k)
            rows = windows * -(-layer.m // windows)
        return rows * self._padded(layer) * self.widths.compute

    def _windows(self, layer: Linear) -> int:
        """Bytes of the inputs' gradients before inputs that two windows have are summed."""
        features = num_windows(layer.n, layer.k) * layer.k if layer.support == "blocks" else layer.n
        return features * self._padded(layer) * self.widths.compute

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
            if not self.device.kernels:
                windows = num_windows(layer.n, layer.k)
                made.append(tape.new(SPARSE, windows * -(-layer.m // windows) * layer.k * w))
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
