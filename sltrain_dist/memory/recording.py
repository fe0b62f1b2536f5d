"""Recordings of what modules allocate and free (no torch), and their format on disk.

A recording consists of these passes, in order:

- A decoder layer: "forward" begins with the layer's input live and ends with its output live too. "leave autocast"
  frees cast weights at the end of the model's forward pass. "backward" begins with the gradient of the output live and
  ends with that of the input.
- The parts before and after the layers: "embedding" ends with the first layer's input and the tensors that all layers
  share, "loss" begins with the last layer's output, "loss backward" ends with its gradient, and "embedding backward"
  begins with the gradient of the first layer's input.
- An evaluation: "embedding", "layer", whose output replaces its input, and "loss".
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

from sltrain_dist.numerics.int8_layout import int8_bytes

Bytes = dict[str, int]
"""Bytes by component; see :data:`sltrain_dist.memory.result.Group`."""


@dataclass(frozen=True)
class Step:
    """Part of a pass up to the arrival or the release of a parameter's gradient.

    Attributes:
        where: Name of the moment at which most bytes are live, such as "mlp".
        peak: Bytes at that moment, relative to the step's start; empty if no moment takes more than the start.
        end: Bytes at the end, relative to the start, without those of a gradient that is released at the end.
        arrives: (parameter's index, number of the storage) of the gradient that is complete at the end. Several
            gradients may share a storage.
        released: Number of the storage of gradients that autograd releases at the end, which frees it unless
            something else refers to it.
        shared: Whether the step only frees a storage that all layers share, which happens in the last of them.
    """

    where: str
    peak: Bytes
    end: Bytes
    arrives: tuple[int, int] | None = None
    released: int | None = None
    shared: bool = False


@dataclass(frozen=True)
class Pass:
    """Everything that a forward or backward pass allocates and frees, in order.

    Attributes:
        steps: The pass in steps.
        gradient_bytes: Bytes of each storage of gradients, by its number.
    """

    steps: tuple[Step, ...]
    gradient_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """A parameter of the recorded modules.

    Attributes:
        name: Its name in the module, such as "mlp.up_proj.B".
        component: Memory component of its bytes.
        shape: Its shape.
        replaced: Whether it belongs to a linear layer that SLTrain replaces, whatever the method.
        int8: Whether it is an int8 weight.
        frozen: Whether it is not trained, and has neither a gradient nor optimizer states.
    """

    name: str
    component: Literal["factors", "sparse_values", "dense"]
    shape: tuple[int, ...]
    replaced: bool
    int8: bool
    frozen: bool = False

    @cached_property
    def values(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def stored_bytes(self, width: int) -> int:
        """Returns the bytes of the parameter, at `width` bytes a value unless it is an int8 weight."""
        return int8_bytes(self.shape) if self.int8 else width * self.values


@dataclass(frozen=True, eq=False)  # hashed by identity, which is fast: recording_store.py never makes two equal ones
class Recording:
    """A recording of a decoder layer, of the parts before and after the layers, an evaluation or an optimizer step.

    Attributes:
        passes: Passes by name.
        parameters: Parameters whose gradients arrive in the passes, in the order of `named_parameters()`.
        flops: Floating-point operations of all passes.
        sizes: Other bytes: "buffers" (support indices of a layer, or the rotary table), "step" (transient bytes of an
            optimizer step, beyond parameter, gradient and states), "restart" (of a layer's new factorization, with its
            factors in float32), and states by component. Of a job of `optim.factors`: "inputs" and "results" (its
            whole tensors), and the transient bytes of "collect", "compute" and "deliver" beyond these.
    """

    passes: dict[str, Pass] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    flops: int = 0
    sizes: Bytes = field(default_factory=dict)


def dumps(recording: Recording) -> bytes:
    """Returns a recording as JSON."""
    return json.dumps(asdict(recording)).encode()


def loads(text: bytes) -> Recording:
    """Returns the recording that :func:`dumps` wrote."""
    values = json.loads(text)
    return Recording(
        {name: _pass(**value) for name, value in values["passes"].items()},
        tuple(Parameter(**{**value, "shape": tuple(value["shape"])}) for value in values["parameters"]),
        values["flops"],
        values["sizes"],
    )


def _pass(steps: list[dict[str, Any]], gradient_bytes: list[int]) -> Pass:
    return Pass(
        tuple(Step(**{**step, "arrives": step["arrives"] and tuple(step["arrives"])}) for step in steps),
        tuple(gradient_bytes),
    )
