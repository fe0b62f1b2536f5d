"""What becomes of a parameter's gradient when it arrives (no torch)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

from sltrain_dist.memory.tape import Buffer, Tape
from sltrain_dist.memory.updates import StepMemory
from sltrain_dist.numerics.int8_layout import int8_bytes


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, the same in every block.

    Attributes:
        group: "factors", "sparse_values" or "dense".
        shape: Its shape.
        decays: Whether weight decay applies to it, where there is any (optim/state_layout.py: decays).
        int8: Whether it is an int8 weight.
    """

    group: str
    shape: tuple[int, ...]
    decays: bool = True
    int8: bool = False

    def stored(self, width: int) -> int:
        """Bytes of the parameter, where others than int8 weights take `width` a value."""
        return int8_bytes(self.shape) if self.int8 else width * self.values

    @property
    def values(self) -> int:
        """Number of them."""
        return prod(self.shape)


Arrived = Sequence[tuple[Parameter, Buffer]]


class Sink(Protocol):
    """Takes the gradients of one autograd function."""

    def arrive(self, tape: Tape, gradients: Arrived) -> None:
        """Owns the buffers from now on. Several parameters may share one."""


class Keep:
    """They become `.grad`, and wait for the update."""

    def arrive(self, tape: Tape, gradients: Arrived) -> None:
        """They stay."""


class Add:
    """They are added to what is there: an earlier micro-batch's, or DDP's bucket.

    Args:
        how: What is the same for all gradients.
    """

    def __init__(self, how: Arrivals) -> None:
        self._how = how

    def arrive(self, tape: Tape, gradients: Arrived) -> None:
        """They go; where DDP's bucket takes them, so do those of earlier micro-batches."""
        for parameter, buffer in gradients:
            tape.drop(buffer)
            if self._how.held:
                tape.add("gradients", -parameter.values * self._how.width)
        if self._how.message:
            tape.brief("buffers.messages", self._how.message)


class Step:
    """Per-layer updates: their parameters are updated, one after the other.

    Args:
        how: What is the same for all gradients.
        waiting: Parameters whose gradients are on their way at the beginning.
    """

    def __init__(self, how: Arrivals, waiting: Sequence[Parameter] = ()) -> None:
        self._how = how
        self._sent: deque[tuple[Parameter, Buffer | None]] = deque((parameter, None) for parameter in waiting)

    def arrive(self, tape: Tape, gradients: Arrived) -> None:
        """They are used, at once or when they come back."""
        for parameter, gradient in gradients:
            buffer: Buffer | None = gradient
            if self._how.held:  # added to that of earlier micro-batches
                tape.drop(gradient)
                buffer = None
            if self._how.in_flight is None:
                self._use(tape, parameter, buffer)
                continue
            self._sent.append((parameter, buffer))
            self.receive(tape, self._how.in_flight)

    def receive(self, tape: Tape, at_most: int) -> None:
        """Uses the oldest until so many bytes are on their way."""
        while sum(parameter.values for parameter, _ in self._sent) * self._how.width > at_most:
            self._use(tape, *self._sent.popleft())

    @property
    def waiting(self) -> tuple[Parameter, ...]:
        """On their way, the oldest first."""
        return tuple(parameter for parameter, _ in self._sent)

    def _use(self, tape: Tape, parameter: Parameter, buffer: Buffer | None) -> None:
        assert self._how.step is not None  # where gradients are used up, something steps
        tape.brief("temporaries.update", self._how.step.of(parameter.shape, int8=parameter.int8))
        if buffer is None:
            tape.add("gradients", -parameter.values * self._how.width)
        else:
            tape.drop(buffer)


@dataclass(frozen=True)
class Arrivals:
    """How gradients are taken.

    Attributes:
        kind: keep: they become `.grad`. add: they are added to what is there, an earlier micro-batch's or DDP's bucket.
            step: they are used up by per-layer updates.
        width: Bytes of a value.
        step: What an update takes, with step.
        in_flight: With step, most bytes that are being summed over the ranks meanwhile; None on one rank.
        held: Whether there are gradients of earlier micro-batches, which are free when these have come.
        message: With add, bytes of a copy in which a full bucket is sent.
    """

    kind: Literal["keep", "add", "step"]
    width: int
    step: StepMemory | None = None
    in_flight: int | None = None
    held: bool = False
    message: int = 0

    def sink(self, waiting: Sequence[Parameter] = ()) -> Keep | Add | Step:
        """For a stretch of training, at whose beginning some gradients are on their way."""
        if self.kind == "step":
            return Step(self, waiting)
        return Keep() if self.kind == "keep" else Add(self)
