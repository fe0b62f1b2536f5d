"""What the replaced linear layers allocate, forward and backward (no torch): sparse_lowrank/materialize.py and
factored.py, `LowRankLinear` and `nn.Linear`, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.planner.device import Device
from sltrain_dist.planner.gradients import Parameter, Sink
from sltrain_dist.planner.tape import Buffer, Tape
from sltrain_dist.sparse_lowrank.cost import Plan
from sltrain_dist.sparse_lowrank.layout import num_windows

WEIGHT, WEIGHT_GRADIENT = "temporaries.weight", "temporaries.weight_gradient"
LOW_RANK, SPARSE, CASTS = "temporaries.low_rank", "temporaries.sparse", "temporaries.casts"
OUTPUT_GRADIENTS = "temporaries.activation_gradients"
CAST_WEIGHTS = "activations.cast_weights"
_ALIGN = 16
"""Tokens are padded to a multiple of this by sparse_lowrank/kernels.py."""


@dataclass(frozen=True)
class Widths:
    """Bytes of a value.

    Attributes:
        parameter: Of parameters, as they are at hand in a forward pass (under fsdp: gathered).
        gradient: Of their gradients.
        compute: Of matrix products.
        residual: Of the residual stream.
    """

    parameter: int
    gradient: int
    compute: int
    residual: int

    @property
    def casts(self) -> bool:
        """Whether parameters are cast for matrix products (autocast)."""
        return self.parameter != self.compute


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        m, n: out_features, in_features.
        rank: r; 0 for a dense weight.
        nnz: Sparse values; 0 without S.
        support: Their arrangement.
        k: Values of a row, where all have as many.
        plan: How it is applied.
        rows: Rows of W that are built at a time.
        parameters: B, A and V, or B and A, or the weight, in this order.
    """

    m: int
    n: int
    rank: int
    nnz: int
    support: SupportKind
    k: int
    plan: Plan
    rows: int
    parameters: tuple[Parameter, ...]

    @property
    def together(self) -> bool:
        """Whether it is applied by `Factored`, with others that share its input."""
        return self.nnz > 0 and self.plan.path == "factored"


@dataclass
class Call:
    """What a call of several layers on one input keeps for the backward pass."""

    layers: Sequence[Linear]
    inputs: list[Buffer]
    hidden: list[Buffer]
    casts: list[Buffer]


class LinearTape:
    """Goes through the layers of a block.

    Args:
        tape: Takes what is allocated and freed.
        tokens: T.
        widths: Bytes of a value.
        device: Where it runs.
    """

    def __init__(self, tape: Tape, tokens: int, widths: Widths, device: Device) -> None:
        self.tape, self.tokens, self.widths, self.device = tape, tokens, widths, device

    def forward(self, layers: Sequence[Linear], x: Buffer, out: str, *, saves: bool) -> tuple[list[Buffer], Call]:
        """Applies layers to x, which stays the caller's.

        Args:
            layers: They share the input.
            x: (T, n) in the residual stream's or the compute type.
            out: Component of the outputs.
            saves: Whether autograd keeps what the backward pass needs.

        Returns:
            An output of each layer, (T, m), and what is kept.
        """
        tape, t, w = self.tape, self.tokens, self.widths.compute
        call = Call(layers, [], [], [])
        cast = x.size != t * layers[0].n * w
        outputs: list[Buffer] = []
        if layers[0].nnz:
            flat = tape.new("activations.casts", t * layers[0].n * w) if cast else tape.keep(x)
            together = [layer for layer in layers if layer.together]
            made = self._factored_forward(together, flat, out, call) if together else []
            for layer in layers:
                outputs.append(made.pop(0) if layer.together else self._materialize_forward(layer, out))
            call.inputs.append(flat)
        else:
            for layer in layers:  # autocast casts the input anew in every call
                call.inputs.append(tape.new("activations.casts", t * layer.n * w) if cast else tape.keep(x))
                outputs.append(self._plain_forward(layer, out, call))
        if not saves:
            tape.drop(*call.inputs, *call.hidden)
        return outputs, call

    def backward(self, call: Call, grads: list[Buffer], sink: Sink) -> Buffer:
        """Takes the outputs' gradients and gives the input's, in the compute type; frees what was kept."""
        tape, dx = self.tape, None
        inputs = list(call.inputs)
        together = [(layer, grad) for layer, grad in zip(call.layers, grads, strict=True) if layer.together]
        alone = [(layer, grad) for layer, grad in zip(call.layers, grads, strict=True) if not layer.together]
        for left, (layer, grad) in reversed(list(enumerate(alone))):  # autograd: what was made last comes first
            if layer.nnz == 0:
                part = self._plain_backward(layer, grad, inputs.pop(), call, sink)
            elif layer.plan.dense_backward:
                part = self._dense_backward(layer, grad, sink)
            else:
                part = self._factored_backward([layer], [grad], None, sink)
            if layer.nnz and left == 0 and not together:
                tape.drop(*call.inputs)
            dx = self._sum(dx, part)
        if together:
            part = self._factored_backward([layer for layer, _ in together], [g for _, g in together], call, sink)
            dx = self._sum(dx, part)
        assert dx is not None  # there are layers
        return dx

    def _sum(self, first: Buffer | None, second: Buffer) -> Buffer:
        """Autograd adds what arrives at a tensor from several users; not in place while a dispatch mode looks on."""
        if first is None:
            return second
        total = self.tape.new(OUTPUT_GRADIENTS, first.size)
        self.tape.drop(first, second)
        return total

    # nn.Linear and LowRankLinear

    def _plain_forward(self, layer: Linear, out: str, call: Call) -> Buffer:
        tape, t, w = self.tape, self.tokens, self.widths.compute
        if self.widths.casts:  # cached until autocast ends, and saved
            call.casts += [tape.new(CAST_WEIGHTS, w * p.values) for p in layer.parameters]
        if not layer.rank:
            return tape.new(out, t * layer.m * w)
        call.hidden.append(tape.new("activations.low_rank", t * layer.rank * w))
        product = tape.new(LOW_RANK, t * layer.m * w)
        y = tape.new(out, t * layer.m * w)  # scaled
        tape.drop(product)
        return y

    def _plain_backward(self, layer: Linear, grad: Buffer, x: Buffer, call: Call, sink: Sink) -> Buffer:
        tape, t, w = self.tape, self.tokens, self.widths.compute
        if layer.rank:
            scaled = tape.new(OUTPUT_GRADIENTS, grad.size)
            tape.drop(grad)
            dB, dh = self._plain_gradient(layer.parameters[0]), tape.new(LOW_RANK, t * layer.rank * w)
            tape.drop(scaled, call.hidden.pop())
            self._arrived(dB, layer.parameters[0], call, sink)
            dA, dx = self._plain_gradient(layer.parameters[1]), tape.new(OUTPUT_GRADIENTS, t * layer.n * w)
            tape.drop(dh, x)
            self._arrived(dA, layer.parameters[1], call, sink)
            return dx
        dW = self._plain_gradient(layer.parameters[0])
        dx = tape.new(OUTPUT_GRADIENTS, t * layer.n * w)
        tape.drop(grad, x)
        self._arrived(dW, layer.parameters[0], call, sink)
        return dx

    def _plain_gradient(self, parameter: Parameter) -> Buffer:
        return self.tape.new("gradients" if not self.widths.casts else CASTS, parameter.values * self.widths.compute)

    def _arrived(self, gradient: Buffer, parameter: Parameter, call: Call, sink: Sink) -> None:
        """Autocast's casts are undone in the backward pass; the cast weight is then of no more use."""
        if self.widths.casts:
            cast = gradient
            gradient = self.tape.new("gradients", parameter.values * self.widths.gradient)
            self.tape.drop(cast, call.casts.pop())
        sink.arrive(self.tape, [(parameter, gradient)])

    # The path materialize

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

    def _materialize_forward(self, layer: Linear, out: str) -> Buffer:
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

    def _dense_backward(self, layer: Linear, grad: Buffer, sink: Sink) -> Buffer:
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

    # The path factored

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

    def _factored_forward(self, layers: Sequence[Linear], flat: Buffer, out: str, call: Call) -> list[Buffer]:
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

    def _factored_backward(
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

    @dataclass
    class _Values:
        gradients: list[Buffer]
        temporary: list[Buffer]

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
        return self._Values(gradients, [b for b in (inputs, outputs, total, *sparse) if b is not None])

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
