"""What the path materialize allocates (no torch): sparse_lowrank/materialize.py, line by line."""

from __future__ import annotations

from sltrain_dist.memory.gradients import Sink
from sltrain_dist.memory.operands import (
    CASTS,
    LOW_RANK,
    OUTPUT_GRADIENTS,
    SPARSE,
    WEIGHT,
    WEIGHT_GRADIENT,
    Linear,
    OperatorTape,
)
from sltrain_dist.memory.tape import Buffer


class MaterializeTape(OperatorTape):
    """Goes through single layers whose W is built."""

    def _build(self, layer: Linear, rows: int) -> Buffer:
        """`build_rows`: W of some rows, while its factors are cast and the values are added."""
        tape, w = self.tape, self.widths.compute
        casts = tape.new(CASTS, w * layer.rank * (rows + layer.n)) if self.widths.casts else None
        W = tape.new(WEIGHT, rows * layer.n * w)
        tape.drop(casts)
        if layer.support == "stratified" and self.device.kernels:
            return W
        casts = tape.new(CASTS, w * layer.share(rows)) if self.widths.casts else None
        places = self.positions(layer, rows)
        tape.drop(casts, places)
        return W

    def materialize_forward(self, layer: Linear, out: str) -> Buffer:
        tape, t, w = self.tape, self.tokens, self.widths.compute
        plain = self.dequantized([layer])
        if layer.rows >= layer.m:
            W = self._build(layer, layer.m)
            y = tape.new(out, t * layer.m * w)
            tape.drop(W, *plain)
            return y
        y = tape.new(out, t * layer.m * w)
        W = self._build(layer, layer.rows)
        part = tape.new(OUTPUT_GRADIENTS, t * layer.rows * w)
        tape.drop(W, part, *plain)
        return y

    def dense_backward(self, layer: Linear, grad: Buffer, sink: Sink) -> Buffer:
        tape, t, w = self.tape, self.tokens, self.widths.compute
        B, A, V = layer.parameters
        wide = self.widths.parameter
        plain = self.dequantized([layer])
        dx = tape.new(OUTPUT_GRADIENTS, t * layer.n * w)
        dB, dA = tape.new("gradients", B.values * wide), tape.new("gradients", A.values * w)
        dV = tape.new("gradients", V.values * wide)
        G: Buffer | None = None
        for rows in (layer.rows, min(layer.rows, layer.m - layer.rows)):  # later ones take no more
            if rows == 0:
                break
            W = self._build(layer, rows)
            tape.drop(W)
            made = tape.new(WEIGHT_GRADIENT, rows * layer.n * w)
            tape.drop(G)  # that of the rows before
            G = made
            self._from_dense_gradient(layer, rows)
        tape.drop(G)
        if wide != w:
            whole = tape.new("gradients", A.values * wide)
            tape.drop(dA)
            dA = whole
        tape.drop(grad, *plain)
        sink.arrive(tape, [(B, dB), (A, dA), (V, dV)])
        return dx

    def _from_dense_gradient(self, layer: Linear, rows: int) -> None:
        tape, w = self.tape, self.widths.compute
        cast = tape.new(CASTS, layer.rank * layer.n * w) if self.widths.casts else None
        product = tape.new(LOW_RANK, rows * layer.rank * w)
        tape.drop(cast, product)
        if self.widths.casts:
            tape.brief(CASTS, rows * layer.rank * w)
        kernels = layer.support == "stratified" and self.device.kernels
        places = None if kernels else self.positions(layer, rows)
        values = tape.new(SPARSE, layer.share(rows) * w)
        tape.drop(places, values)
