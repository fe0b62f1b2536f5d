"""What is before and after the decoder blocks (no torch): embedding, last norm, head and loss (models/loss.py)."""

from __future__ import annotations

from dataclasses import dataclass

from sltrain_dist.memory.block import NORMS, RESIDUAL
from sltrain_dist.memory.device import Device
from sltrain_dist.memory.gradients import Parameter, Sink
from sltrain_dist.memory.operands import CAST_WEIGHTS, CASTS, OUTPUT_GRADIENTS, Widths
from sltrain_dist.memory.tape import Buffer, Tape

LOSS, LOGITS = "activations.loss", "temporaries.logits"


@dataclass(frozen=True, eq=False)  # as Block
class Ends:
    """Sizes of what is before and after the blocks.

    Attributes:
        tokens: T.
        vocabulary: V.
        hidden: h.
        chunk: Tokens whose logits exist at a time; 0 for all, with autograd.
        tied: Whether head and embedding are one parameter.
        widths: Bytes of a value.
        device: Where it runs.
        int8: Whether the head is an int8 weight.
    """

    tokens: int
    vocabulary: int
    hidden: int
    chunk: int
    tied: bool
    widths: Widths
    device: Device
    int8: bool = False

    @property
    def table(self) -> Parameter:
        """The embedding's weight."""
        return Parameter("dense", (self.vocabulary, self.hidden), decays=False)

    @property
    def head(self) -> Parameter:
        """The head's weight, where it is not the embedding's."""
        return Parameter("dense", (self.vocabulary, self.hidden), int8=self.int8)

    @property
    def gain(self) -> Parameter:
        """The last norm's."""
        return Parameter("dense", (self.hidden,), decays=False)


class EndsTape:
    """Goes through them on a tape."""

    def __init__(self, tape: Tape, ends: Ends) -> None:
        self.tape, self.ends = tape, ends

    def forward(self, x: Buffer) -> list[Buffer]:
        """Last norm, head and loss; x stays the caller's.

        Returns:
            What is kept: the norm's inverse roots; then the gradients of hidden states and weight, if chunked, or
            hidden states, the log-probabilities and maybe the cast weight.
        """
        tape, e = self.tape, self.ends
        tape.at("last norm")
        inverse = tape.new(NORMS, e.tokens * (4 if e.device.fused else e.widths.residual))
        hidden = tape.new(LOGITS if e.chunk else NORMS, x.size)
        kept = self._chunked(hidden) if e.chunk else self._whole(hidden)
        return [inverse, *kept]

    def _chunked(self, hidden: Buffer) -> list[Buffer]:
        tape, e = self.tape, self.ends
        w, V, h = e.widths.compute, e.vocabulary, e.hidden
        tape.at("loss, a chunk of its tokens")
        cast = tape.new(CASTS, V * h * w) if e.widths.casts else None
        grad_x = tape.new(LOSS, hidden.size)
        several = e.tokens > e.chunk
        grad_weight = tape.new(LOSS, 4 * V * h) if several else None
        before: list[Buffer] = []
        for first in range(0, min(e.tokens, 3 * e.chunk), e.chunk):  # later ones take no more than the third
            count = min(e.chunk, e.tokens - first)
            part = tape.new(LOGITS, count * h * w) if e.widths.casts else None
            logits = tape.new(LOGITS, count * V * w)
            words = min(V, max(1, (1 << 21) // h))  # Int8Weight.row_blocks
            if e.int8:
                tape.brief(LOGITS, words * (h + count) * w)
            wide = tape.new(LOGITS, 4 * count * V) if w < 4 else None  # log_softmax casts bf16 before, on CUDA too
            log_p = tape.new(LOGITS, 4 * count * V)
            tape.drop(wide)
            grad_logits = tape.new(LOGITS, count * V * w) if w < 4 else tape.keep(log_p)
            tape.drop(log_p, logits, *before)
            if e.int8:  # summed over blocks of words in float32
                total = tape.new(LOGITS, 4 * count * h)
                tape.brief(LOGITS, (words + count) * h * w)
                if w < 4:
                    tape.brief(LOGITS, count * h * w)
                tape.drop(total)
            else:
                tape.brief(LOGITS, count * h * w)
            counted = tape.new(LOGITS, count * h * w)
            tape.drop(part)
            if several:
                if w < 4:
                    tape.brief(LOGITS, V * h * w)
            else:
                grad_weight = tape.new(LOSS, V * h * w)
            before = [grad_logits, counted]
        tape.drop(*before, cast, hidden)
        assert grad_weight is not None  # there are tokens
        return [grad_x, grad_weight]

    def _whole(self, hidden: Buffer) -> list[Buffer]:
        tape, e = self.tape, self.ends
        w, V = e.widths.compute, e.vocabulary
        tape.at("loss")
        kept = []
        if e.widths.casts:
            cast = tape.new("activations.casts", e.tokens * e.hidden * w)
            tape.drop(hidden)
            hidden = cast
            kept.append(tape.new(CAST_WEIGHTS, V * e.hidden * w))
        plain = [tape.new(LOSS, V * e.hidden * w)] if e.int8 else []
        logits = tape.new(LOGITS, e.tokens * V * w)
        wide = tape.new(LOGITS, 4 * e.tokens * V) if w < 4 else tape.keep(logits)
        log_p = tape.new(LOSS, 4 * e.tokens * V)
        tape.drop(logits, wide)
        return [hidden, log_p, *plain, *kept]

    def backward(self, x: Buffer, kept: list[Buffer], sink: Sink) -> Buffer:
        """From the loss to the gradient of x, the last block's output, of which an owner is taken.

        With a tied head, its gradient waits for the embedding's.
        """
        tape, e = self.tape, self.ends
        tape.at("backward of loss and head")
        inverse, *kept = kept
        grad = self._chunked_backward(kept, sink) if e.chunk else self._whole_backward(kept, sink)
        tape.at("backward of last norm")
        dx = tape.new(OUTPUT_GRADIENTS, x.size)
        if not e.device.fused:
            tape.brief(OUTPUT_GRADIENTS, x.size)
        gain = tape.new("gradients", e.hidden * e.widths.gradient)
        tape.drop(grad, x, inverse)
        sink.arrive(tape, [(e.gain, gain)])
        return dx

    def _chunked_backward(self, kept: list[Buffer], sink: Sink) -> Buffer:
        tape, e = self.tape, self.ends
        grad_x, grad_weight = kept
        size = e.vocabulary * e.hidden * e.widths.parameter
        gradient = tape.rename(grad_weight, "gradients") if grad_weight.size == size else tape.new("gradients", size)
        if gradient is not grad_weight:
            tape.drop(grad_weight)
        self._weight_arrived(gradient, sink)
        return grad_x

    def _whole_backward(self, kept: list[Buffer], sink: Sink) -> Buffer:
        tape, e = self.tape, self.ends
        w, V, h = e.widths.compute, e.vocabulary, e.hidden
        hidden, log_p, *cast = kept
        plain = cast.pop(0) if e.int8 else None
        outer = tape.new(LOGITS, log_p.size)
        grad = tape.new(LOGITS, log_p.size)
        tape.drop(outer, log_p)
        if w < 4:
            narrow = tape.new(LOGITS, e.tokens * V * w)
            tape.drop(grad)
            grad = narrow
        gradient = tape.new(CASTS if cast else "gradients", V * h * w)
        dx = tape.new(OUTPUT_GRADIENTS, e.tokens * h * w)
        tape.drop(grad, hidden, plain, *cast)
        if cast:
            wide = tape.new("gradients", V * h * e.widths.gradient)
            tape.drop(gradient)
            gradient = wide
            full = tape.new(OUTPUT_GRADIENTS, e.tokens * h * e.widths.residual)
            tape.drop(dx)
            dx = full
        self._weight_arrived(gradient, sink)
        return dx

    def _weight_arrived(self, gradient: Buffer, sink: Sink) -> None:
        if not self.ends.tied:
            sink.arrive(self.tape, [(self.ends.head, gradient)])

    def embedding(self) -> Buffer:
        """The residual stream's beginning."""
        self.tape.at("embedding")
        return self.tape.new(RESIDUAL, self.ends.tokens * self.ends.hidden * self.ends.widths.residual)

    def embedding_backward(self, grad: Buffer, sink: Sink) -> None:
        """The gradient of the embedding's weight, a dense one."""
        tape, e = self.tape, self.ends
        tape.at("backward of embedding")
        size = e.table.values * e.widths.gradient
        gradient = tape.new("gradients", size)
        tape.drop(grad)
        if e.tied:  # both are summed before they arrive
            total = tape.new("gradients", size)
            tape.drop(gradient)
            tape.add("gradients", -size)
            gradient = total
        sink.arrive(tape, [(e.table, gradient)])
