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
        call.hidden.append(self._inner(layers, "activations.low_rank"))
        sparse = self._sparse(layers, transposed=False)
        sliced = self._slice(layers[0]) < t
        outputs = [tape.new(out, t * layer.m * w) for layer in layers] if sliced else []
        arranged = tape.new(SPARSE, self._arranged_inputs(layers[0]))
        for layer in layers:
            product = tape.new(SPARSE, self._arranged_outputs(layer))
            if not sliced:
                outputs.append(tape.new(out, t * layer.m * w))
            tape.drop(product)
        if sliced:
            tape.brief(SPARSE, arranged.size)  # the next slice's, before this one's is gone
        tape.drop(arranged, *sparse)
        if self.widths.casts:
            tape.brief(CASTS, max(layer.m * layer.rank for layer in layers) * w)
        return outputs

    def factored_backward(
        self, layers: Sequence[Linear], grads: Sequence[Buffer], call: Call | None, sink: Sink
    ) -> Buffer:
        """`factored_backward`; without a call, of a layer whose forward pass has built W."""
        tape, t, w, n = self.tape, self.tokens, self.widths.compute, layers[0].n
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
        tape.drop(q, h, dA, *grads)
        if call is not None:
            tape.drop(*call.hidden, *call.inputs)
        sink.arrive(tape, arrived)
        return dx

    def _sparse_backward(self, layers: Sequence[Linear]) -> _Values:
        """`_sparse_backward`, of one slice of tokens: the values' gradients in float32, and what still lives."""
        tape = self.tape
        sparse = self._sparse(layers, transposed=True)
        if layers[0].support != "blocks" or not self.device.kernels:
            sparse += self._sparse(layers, transposed=False)  # `places`
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

    def _sparse(self, layers: Sequence[Linear], *, transposed: bool) -> list[Buffer]:
        """`weights`, or `transposed_weights`, of all layers: positions, and values in the compute type."""
        tape, w, made = self.tape, self.widths.compute, []
        for layer in layers:
            if layer.support == "blocks":
                if self.widths.casts:
                    made.append(tape.new(CASTS, layer.nnz * w))
                if not self.device.kernels:
                    windows = num_windows(layer.n, layer.k)
                    made.append(tape.new(SPARSE, windows * -(-layer.m // windows) * layer.k * w))
                continue
            # Rows and columns, int32; transposed also sorted columns (int32), their order (int64), and the values.
            here = 8 * layer.nnz
            rows_and_columns = tape.new(SPARSE, here + 4 * layer.nnz)
            if transposed:
                tape.brief(SPARSE, 12 * layer.nnz)
            tape.drop(rows_and_columns)
            made.append(
                tape.new(SPARSE, (4 + (w if transposed else 0)) * layer.nnz + 4 * (layer.n if transposed else layer.m))
            )
            if self.widths.casts:
                made.append(tape.new(CASTS, layer.nnz * w))
        return made
