"""Recordings of what modules allocate and free, in a form without torch that is kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

from pydantic import TypeAdapter

from sltrain_dist.numerics.int8_layout import int8_bytes

Bytes = dict[str, int]
"""Bytes by component; see :data:`sltrain_dist.memory.result.Group`."""


@dataclass(frozen=True)
class Step:
    """Part of a pass in which no parameter's gradient arrives or is released.

    Attributes:
        where: Name of the moment at which most bytes are live, such as "mlp".
        peak: Bytes then, relative to the step's start; empty where no moment takes more than the start.
        end: Bytes at its end, relative to its start; those of a gradient that is released then are not in it.
        arrives: (index of the parameter, storage) whose gradient is complete at the end; storages are numbered.
            Several gradients may share one.
        released: The storage of gradients that autograd lets go of at the end. It is freed there unless somebody
            else keeps it.
        shared: Whether it only frees what all layers share, which happens in the last of them to use it.
    """

    where: str
    peak: Bytes
    end: Bytes
    arrives: tuple[int, int] | None = None
    released: int | None = None
    shared: bool = False


@dataclass(frozen=True)
class Pass:
    """What a forward or backward pass allocates and frees, in its order.

    Attributes:
        steps: The parts.
        gradient_bytes: Bytes of each storage of gradients, by its number.
    """

    steps: tuple[Step, ...]
    gradient_bytes: tuple[int, ...] = ()

    @property
    def end(self) -> Bytes:
        """Bytes by component that are live at the end, relative to the start, where no gradient is kept."""
        sums: dict[str, int] = {}
        for step in self.steps:
            for component, size in step.end.items():
                sums[component] = sums.get(component, 0) + size
            if step.released is not None:
                sums["gradients"] = sums.get("gradients", 0) - self.gradient_bytes[step.released]
        return sums


@dataclass(frozen=True)
class Parameter:
    """A parameter of what was recorded.

    Attributes:
        name: Its name in the module, such as "mlp.up_proj.B".
        component: "factors", "sparse_values" or "dense".
        shape: Its shape.
        replaced: Whether it belongs to a linear layer that SLTrain replaces, whatever the method.
        int8: Whether it is an int8 weight.
    """

    name: str
    component: Literal["factors", "sparse_values", "dense"]
    shape: tuple[int, ...]
    replaced: bool
    int8: bool

    @cached_property
    def values(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def stored_bytes(self, width: int) -> int:
        """Bytes of the parameter, where others than int8 weights take `width` a value."""
        return int8_bytes(self.shape) if self.int8 else width * self.values


@dataclass(frozen=True)
class LayerRecording:
    """A decoder layer.

    Attributes:
        parameters: In the order of `named_parameters()`.
        index_bytes: Bytes of the supports' buffers.
        forward: Begins with the layer's input live, ends with its output as well.
        leave_autocast: Bytes that become free at the end of the model's forward pass, negative.
        backward: Begins with the gradient of the output live, ends with that of the input.
        flops: Floating-point operations of both passes.
    """

    parameters: tuple[Parameter, ...]
    index_bytes: int
    forward: Pass
    leave_autocast: Bytes
    backward: Pass
    flops: int


@dataclass(frozen=True)
class EndsRecording:
    """What is before and after the decoder layers: embedding, last norm, head and loss.

    Attributes:
        parameters: In the order of `named_parameters()`.
        buffer_bytes: Bytes of the rotary table.
        embedding: Forward pass to the first layer's input. Ends with that and what all layers share.
        loss: From the last layer's output to the loss.
        loss_backward: From the loss to the gradient of the last layer's output.
        embedding_backward: From the gradient of the first layer's input.
        flops: Floating-point operations of all of these.
    """

    parameters: tuple[Parameter, ...]
    buffer_bytes: int
    embedding: Pass
    loss: Pass
    loss_backward: Pass
    embedding_backward: Pass
    flops: int


@dataclass(frozen=True)
class EvaluationRecording:
    """A forward pass without gradients.

    Attributes:
        embedding: To the first layer's input. Ends with that and what all layers share.
        layer: Begins with the layer's input live, ends with its output in its place.
        loss: From the last layer's output to the loss.
    """

    embedding: Pass
    layer: Pass
    loss: Pass


@dataclass(frozen=True)
class StepRecording:
    """A step of an optimizer, of one part of a parameter.

    Attributes:
        transient_bytes: Most bytes at a time beside parameter, gradient and states.
    """

    transient_bytes: int


@dataclass(frozen=True)
class UpdateRecording:
    """The update of parameters that are alike by an optimizer that is not ours.

    Attributes:
        shape: Shape of each of them.
        replaced: As of :class:`Parameter`.
        transient_bytes: Most bytes at a time beside parameter, gradient and states.
        state_bytes: Bytes of its states, by component.
        flops: Floating-point operations of matrix products.
    """

    shape: tuple[int, ...]
    replaced: bool
    transient_bytes: int
    state_bytes: Bytes
    flops: int


@dataclass(frozen=True)
class PublishedRecording:
    """The code that was published with the paper (plan/paper/published.py).

    Attributes:
        layer: A decoder layer.
        ends: What is before and after the layers.
        updates: The distinct updates of parameters.
    """

    layer: LayerRecording
    ends: EndsRecording
    updates: tuple[UpdateRecording, ...]


Recording = LayerRecording | EndsRecording | EvaluationRecording | StepRecording | PublishedRecording
"""What is kept on disk."""


def dumps(recording: Recording) -> bytes:
    """A recording as JSON."""
    return _adapter(type(recording)).dump_json(recording, exclude_defaults=True)


def loads(kind: type[Recording], text: bytes) -> Recording:
    """A recording from JSON.

    Raises:
        ValueError: It is damaged.
    """
    recording: Recording = _adapter(kind).validate_json(text)
    return recording


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """The reader and writer of a kind, which takes long to make."""
    return _adapters.setdefault(kind, _adapters.get(kind) or TypeAdapter(kind))
