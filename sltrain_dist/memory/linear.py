"""What the replaced linear layers allocate, forward and backward (no torch): sparse_lowrank/functional.py, and
`LowRankLinear` and `nn.Linear`, line by line."""

from __future__ import annotations

from collections.abc import Sequence

from sltrain_dist.memory.factored import FactoredTape
from sltrain_dist.memory.gradients import Parameter, Sink
from sltrain_dist.memory.materialized import MaterializeTape
from sltrain_dist.memory.operands import CAST_WEIGHTS, CASTS, LOW_RANK, OUTPUT_GRADIENTS, Call, Linear
from sltrain_dist.memory.tape import Buffer


class LinearTape(MaterializeTape, FactoredTape):
    """Goes through the layers of a block, those that share an input together."""

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
            made = self.factored_forward(together, flat, out, call) if together else []
            for layer in layers:
                outputs.append(made.pop(0) if layer.together else self.materialize_forward(layer, out))
            if call.arranged and len(together) == len(layers):  # else the others save it
                tape.drop(flat)
            else:
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
                part = self.dense_backward(layer, grad, sink)
            else:
                part = self.factored_backward([layer], [grad], None, sink)
            if layer.nnz and left == 0 and not together:
                tape.drop(*call.inputs)
            dx = self._sum(dx, part)
        if together:
            part = self.factored_backward([layer for layer, _ in together], [g for _, g in together], call, sink)
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
            self.tape.drop(call.casts.pop())
            gradient = self.tape.new("gradients", parameter.values * self.widths.gradient)
            self.tape.drop(cast)
        sink.arrive(self.tape, [(parameter, gradient)])
