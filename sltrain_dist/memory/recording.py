"""Recordings of what modules allocate and free, in a form without torch that is kept on disk.

Passes by name, in the order in which they begin:

- A decoder layer: "forward" begins with the layer's input live and ends with its output as well. "leave autocast" frees
  cast weights at the end of the model's forward pass. "backward" begins with the gradient of the output live and ends
  with that of the input.
- What is before and after the layers: "embedding" ends with the first layer's input and what all layers share, "loss"
  begins with the last layer's output, "loss backward" ends with its gradient, and "embedding backward" begins with the
  gradient of the first layer's input.
- An evaluation: "embedding", "layer", which ends with its output in its input's place, and "loss".
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


@dataclass(frozen=True)
class Parameter:
    """A parameter of what was recorded.

    Attributes:
        name: Its name in the module, such as "mlp.up_proj.B".
        component: What its bytes are called.
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


@dataclass(frozen=True, eq=False)  # looked up by identity, which is fast: recording_store.py makes equal ones once
class Recording:
    """What was recorded of one thing.

    Attributes:
        passes: By name.
        parameters: In the order of `named_parameters()`; those whose gradients arrive in the passes.
        flops: Floating-point operations of all passes.
        sizes: Other bytes: "buffers" (supports' indices of a layer, or the rotary table), "step" (most at a time that
            an optimizer's step takes beside parameter, gradient and states), and states by component.
    """

    passes: dict[str, Pass] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    flops: int = 0
    sizes: Bytes = field(default_factory=dict)


def dumps(recording: Recording) -> bytes:
    """A recording as JSON."""
    return json.dumps(asdict(recording)).encode()


def loads(text: bytes) -> Recording:
    """A recording from what :func:`dumps` wrote."""
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
