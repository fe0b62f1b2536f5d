"""What the path materialize allocates (no torch): sparse_lowrank/materialize.py, line by line."""

from __future__ import annotations

from sltrain_dist.planner.gradients import Sink
from sltrain_dist.planner.operands import (
    CASTS,
    LOW_RANK,
    OUTPUT_GRADIENTS,
    SPARSE,
    WEIGHT,
    WEIGHT_GRADIENT,
    Linear,
    OperatorTape,
)
from sltrain_dist.planner.tape import Buffer


class MaterializeTape(OperatorTape):
    """Goes through single layers whose W is built."""

    def _build(self, layer: Linear, rows: int) -> Buffer:
        """`build_rows`: W of some rows, while its factors are cast and the values are added."""
        tape, w = self.tape, self.widths.compute
        share = -(-layer.nnz * rows // layer.m)
        casts = tape.new(CASTS, w * layer.rank * (rows + layer.n)) if self.widths.casts else None
        W = tape.new(WEIGHT, rows * layer.n * w)
        tape.drop(casts)
        if layer.support == "stratified" and self.device.kernels:
            return W
        casts = tape.new(CASTS, w * share) if self.widths.casts else None
        places = self._positions(layer, rows)
        tape.drop(casts, places)
        return W

    def _positions(self, layer: Linear, rows: int) -> Buffer | None:
        """`row_positions`: none of its own for all rows of the random support, int64 for the others'."""
        tape, share = self.tape, -(-layer.nnz * rows // layer.m)
        if layer.support == "random":
            return None if rows >= layer.m else tape.new(SPARSE, share * (4 if layer.m * layer.n < 1 << 31 else 8))
        if layer.support == "blocks":
            columns = tape.new(SPARSE, 4 * share)
        else:  # words, slots and their products, all int64
            words = tape.new(SPARSE, 8 * share)
            tape.brief(SPARSE, 8 * share)
            columns = words
        flat = tape.new(SPARSE, 8 * share)
        tape.drop(columns)
        return flat

    def materialize_forward(self, layer: Linear, out: str) -> Buffer:
        tape, t, w = self.tape, self.tokens, self.widths.compute
        if layer.rows >= layer.m:
            W = self._build(layer, layer.m)
            y = tape.new(out, t * layer.m * w)
            tape.drop(W)
            return y
        y = tape.new(out, t * layer.m * w)
        W = self._build(layer, layer.rows)
        part = tape.new(OUTPUT_GRADIENTS, t * layer.rows * w)
        tape.drop(W, part)
        return y

    def dense_backward(self, layer: Linear, grad: Buffer, sink: Sink) -> Buffer:
        tape, t, w = self.tape, self.tokens, self.widths.compute
        B, A, V = layer.parameters
        wide = self.widths.parameter
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
        tape.drop(grad)
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
        places = None if kernels else self._positions(layer, rows)
        values = tape.new(SPARSE, -(-layer.nnz * rows // layer.m) * w)
        tape.drop(places, values)
