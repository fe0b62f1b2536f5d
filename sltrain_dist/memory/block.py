"""What a decoder block allocates, forward and backward (no torch): models/llama.py, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sltrain_dist.memory.device import Device
from sltrain_dist.memory.gradients import Parameter, Sink
from sltrain_dist.memory.linear import LinearTape
from sltrain_dist.memory.operands import OUTPUT_GRADIENTS, Call, Linear, Widths
from sltrain_dist.memory.tape import Buffer, Tape

Recompute = Literal["nothing", "all", "all but attention"]
RESIDUAL = "activations.residual"
ATTENTION, MLP, NORMS = "activations.attention", "activations.mlp", "activations.norms"


@dataclass(frozen=True, eq=False)  # looked up by identity, which is faster: equal ones are made once (sizes.py)
class Block:
    """Sizes of a decoder block and of what goes through it.

    Attributes:
        batch, length: Of a micro-batch.
        heads: Query heads.
        head_dim: Width of a head.
        linears: In the order of the forward pass: q, k, v, o, gate, up, down.
        norm: A norm's gain.
        widths: Bytes of a value.
        device: Where it runs.
        recompute: What is computed again in the backward pass.
        masked: Whether attention is given a mask, one for all blocks.
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    norm: Parameter
    widths: Widths
    device: Device
    recompute: Recompute
    masked: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.length

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.linears[0].n

    @property
    def fused_attention(self) -> bool:
        """Whether a kernel computes attention without the scores of all pairs of tokens. On CUDA flash attention takes
        no float32, and the memory-efficient kernel no grouped heads (torch's sdp_utils)."""
        return self.masked or not (self.device.type == "cuda" and self.widths.compute == 4 and self.groups > 1)

    @property
    def groups(self) -> int:
        """Query heads of a key head."""
        return self.linears[0].m // self.linears[1].m

    @property
    def residual_bytes(self) -> int:
        """Bytes of the residual stream."""
        return self.tokens * self.hidden * self.widths.residual


class Kept:
    """What autograd keeps of a block, in the order in which the backward pass frees it."""

    def __init__(self) -> None:
        self.norm_inputs: list[list[Buffer]] = []
        self.calls: list[Call] = []
        self.attention: list[Buffer] = []
        self.mlp: list[Buffer] = []


class BlockTape:
    """Goes through a block on a tape."""

    def __init__(self, tape: Tape, block: Block) -> None:
        self.tape, self.block = tape, block
        self.linear = LinearTape(tape, block.tokens, block.widths, block.device)

    def forward(
        self, x: Buffer, *, saves: bool, known: Sequence[Buffer] = (), again: bool = False
    ) -> tuple[Buffer | None, Kept]:
        """Maps the residual stream to a new one; x stays the caller's.

        Args:
            x: (T, hidden).
            saves: Whether autograd keeps what the backward pass needs.
            known: Output of attention that was kept, where this is a recomputation.
            again: Whether it is one. It stops before the last sum, of which nothing is kept.
        """
        tape, kept = self.tape, Kept()
        tape.at("attention")
        normed = self._norm(x, kept, saves=saves)
        attended = self._attention(normed, kept, known, saves=saves)
        middle = tape.new(RESIDUAL, x.size)
        tape.drop(attended, normed)
        tape.at("mlp")
        normed = self._norm(middle, kept, saves=saves)
        y = self._mlp(normed, kept, saves=saves)
        out = None if again else tape.new(RESIDUAL, x.size)
        tape.drop(y, normed, middle)
        return out, kept

    def _norm(self, x: Buffer, kept: Kept, *, saves: bool) -> Buffer:
        """Saved are the input and the inverse root, one value a token."""
        tape = self.tape
        inverse = tape.new(NORMS, self.block.tokens * (4 if self.block.device.fused else self.block.widths.residual))
        normed = tape.new(NORMS, x.size)
        if saves:
            kept.norm_inputs.append([tape.keep(x), inverse])
        else:
            tape.drop(inverse)
        return normed

    def _attention(self, normed: Buffer, kept: Kept, known: Sequence[Buffer], *, saves: bool) -> Buffer:
        tape, block = self.tape, self.block
        (q, k, v), call = self.linear.forward(block.linears[:3], normed, ATTENTION, saves=saves)
        wide = block.widths.residual  # the rotary table has the residual stream's type, and so has what it turns
        turned = [tape.new(ATTENTION, y.size // block.widths.compute * wide) for y in (q, k)]
        tape.drop(q, k)
        inputs = [*turned, v]
        if wide != block.widths.compute:
            inputs = [tape.new(ATTENTION, y.size // wide * block.widths.compute) for y in turned] + [v]
        if block.masked and block.groups > 1:  # keys and values for every query head
            repeated = [tape.new(ATTENTION, q.size) for _ in range(2)]
            if inputs[1] is not turned[1]:
                tape.drop(inputs[1])
            tape.drop(turned.pop(), v)
            v = repeated[1]
            inputs = [inputs[0], *repeated]
        if not block.fused_attention:
            return self._unfused_attention(turned, v, kept, call, saves=saves)
        out = known[0] if known else tape.new(ATTENTION, q.size)
        # The logarithm of the sum of every row's exponentials, in float32.
        sums = known[1] if known else tape.new(ATTENTION, 4 * block.tokens * block.heads)
        if saves:
            kept.attention = [tape.keep(buffer) for buffer in (*inputs, out, sums)]
            kept.calls.append(call)
        elif block.recompute == "all but attention":
            kept.attention = [tape.keep(out), tape.keep(sums)]
        if not known:
            tape.drop(sums)
        if inputs[0] is not turned[0]:
            tape.drop(*inputs[:2])
        elif len(turned) == 1:
            tape.drop(inputs[1])
        (y,), call = self.linear.forward(block.linears[3:4], out, ATTENTION, saves=saves)
        if saves:
            kept.calls.append(call)
        tape.drop(*turned, v)
        if not known:
            tape.drop(out)
        return y

    def _unfused_attention(self, turned: list[Buffer], v: Buffer, kept: Kept, call: Call, *, saves: bool) -> Buffer:
        """torch's composed attention: scaled queries and keys, values for every head, and all scores."""
        tape, block = self.tape, self.block
        whole = turned[0].size
        inputs = [tape.new(ATTENTION, whole) for _ in range(3)]
        scores = tape.new(ATTENTION, self._scores_bytes())
        tape.brief(ATTENTION, scores.size)  # before the mask, or the softmax
        mixed = tape.new(ATTENTION, whole)
        out = tape.new(ATTENTION, whole)  # heads side by side
        tape.drop(mixed)
        if saves:
            kept.attention = [*map(tape.keep, (*inputs, out)), tape.keep(scores)]
            kept.calls.append(call)
        tape.drop(*inputs, scores)
        (y,), call = self.linear.forward(block.linears[3:4], out, ATTENTION, saves=saves)
        if saves:
            kept.calls.append(call)
        tape.drop(*turned, v, out)
        return y

    def _scores_bytes(self) -> int:
        block = self.block
        return block.widths.compute * block.tokens * block.length * block.heads

    def _mlp(self, normed: Buffer, kept: Kept, *, saves: bool) -> Buffer:
        tape, block = self.tape, self.block
        (gate, up), call = self.linear.forward(block.linears[4:6], normed, MLP, saves=saves)
        activated = tape.new(MLP, gate.size)
        product = tape.new(MLP, gate.size)
        if saves:
            kept.mlp = [tape.keep(buffer) for buffer in (gate, up, activated)]
            kept.calls.append(call)
        tape.drop(activated)
        (y,), call = self.linear.forward(block.linears[6:], product, MLP, saves=saves)
        if saves:
            kept.calls.append(call)
        tape.drop(gate, up, product)
        return y

    def backward(self, grad: Buffer, kept: Kept, sink: Sink, gains: Sink) -> Buffer:
        """Maps the gradient of the block's output to that of its input, and frees what was kept.

        Args:
            grad: Of the output; it is used up.
            kept: By the forward pass.
            sink: Takes the gradients of the linear layers' parameters.
            gains: Takes those of the norms'.
        """
        tape, w = self.tape, self.block.widths
        calls = list(kept.calls)
        tape.at("backward of mlp")
        branch = self._narrow(grad)
        product = self.linear.backward(calls.pop(), [branch], sink)
        gate, up, activated = kept.mlp
        d_activated = tape.new(OUTPUT_GRADIENTS, product.size)
        d_up = tape.new(OUTPUT_GRADIENTS, product.size)
        tape.drop(product, up, activated)
        d_gate = tape.new(OUTPUT_GRADIENTS, d_up.size)
        tape.drop(d_activated, gate)
        normed = self.linear.backward(calls.pop(), [d_gate, d_up], sink)
        grad = self._norm_backward(grad, normed, kept, gains)
        tape.at("backward of attention")
        out = self.linear.backward(calls.pop(), [self._narrow(grad)], sink)
        q, k, v = self._attention_backward(out, kept)
        turned = []
        for y in (k, q):
            if w.residual != w.compute:
                wide = tape.new(OUTPUT_GRADIENTS, y.size // w.compute * w.residual)
                tape.drop(y)
                y = wide
            back = tape.new(OUTPUT_GRADIENTS, y.size)
            tape.drop(y)
            if w.residual != w.compute:
                narrow = tape.new(OUTPUT_GRADIENTS, back.size // w.residual * w.compute)
                tape.drop(back)
                back = narrow
            turned.append(back)
        normed = self.linear.backward(calls.pop(), [turned[1], turned[0], v], sink)
        return self._norm_backward(grad, normed, kept, gains)

    def _attention_backward(self, out: Buffer, kept: Kept) -> list[Buffer]:
        tape, block = self.tape, self.block
        if block.fused_attention:
            gradients = [tape.new(OUTPUT_GRADIENTS, buffer.size) for buffer in kept.attention[:3]]
            if block.device.fused:
                tape.brief("temporaries.attention", self._attention_scratch())
            tape.drop(out, *kept.attention)
            if block.masked and block.groups > 1:
                summed = [tape.new(OUTPUT_GRADIENTS, whole.size // block.groups) for whole in gradients[1:]]
                tape.drop(*gradients[1:])
                gradients = [gradients[0], *summed]
            return gradients
        of_scores = tape.new("temporaries.attention", self._scores_bytes())
        tape.brief("temporaries.attention", of_scores.size)  # before the softmax
        whole = [tape.new(OUTPUT_GRADIENTS, buffer.size) for buffer in kept.attention[:3]]
        tape.drop(of_scores, out, *kept.attention)
        gradients = [whole[0], *(tape.new(OUTPUT_GRADIENTS, buffer.size // block.groups) for buffer in whole[1:])]
        tape.drop(*whole[1:])
        return gradients

    def _attention_scratch(self) -> int:
        """What attention's backward kernel takes while it runs, in float32.

        Flash attention adds up the queries' gradients and a sum for every row (mha_bwd in flash_api.cpp: lengths are
        rounded up to 128, widths to 32); the memory-efficient kernel, which float32 takes, the sums alone.
        """
        block = self.block
        rows = block.batch * block.heads
        if block.widths.compute == 4 or block.masked:
            return 4 * rows * block.length
        return 4 * rows * _up(block.length, 128) * (_up(block.head_dim, 32) + 1)

    def _narrow(self, grad: Buffer) -> Buffer:
        """The gradient for a branch that is added to the residual stream: the same, or cast to the branch's type."""
        w = self.block.widths
        if w.residual == w.compute:
            return self.tape.keep(grad)
        return self.tape.new(OUTPUT_GRADIENTS, grad.size // w.residual * w.compute)

    def _norm_backward(self, grad: Buffer, normed: Buffer, kept: Kept, sink: Sink) -> Buffer:
        """Backward of a norm, whose input's gradient is added to the residual stream's."""
        tape, size = self.tape, grad.size
        if normed.size != size:
            wide = tape.new(OUTPUT_GRADIENTS, size)
            tape.drop(normed)
            normed = wide
        dx = tape.new(OUTPUT_GRADIENTS, size)
        if not self.block.device.fused:
            tape.brief(OUTPUT_GRADIENTS, size)
        gain = tape.new("gradients", self.block.norm.values * self.block.widths.gradient)
        tape.drop(normed, *kept.norm_inputs.pop())
        sink.arrive(tape, [(self.block.norm, gain)])
        total = tape.new(OUTPUT_GRADIENTS, size)
        tape.drop(dx, grad)
        return total


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
