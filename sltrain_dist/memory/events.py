"""A log of the storages that a run allocates and frees, with the module responsible for each, and of its FLOPs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sltrain_dist.memory.operators import FLOPS, SCRATCH_BYTES
from sltrain_dist.memory.recording import Bytes, Pass, Step
from sltrain_dist.numerics.device import DeviceType, repetitions
from sltrain_dist.tracking.live_bytes import StorageWatch

KINDS = {
    "embed_tokens": "residual",
    "layers": "residual",
    "input_layernorm": "norms",
    "self_attn": "attention",
    "post_attention_layernorm": "norms",
    "mlp": "mlp",
    "norm": "norms",
    "lm_head": "loss",
}
"""Kind of a module's activations, by the last part of the module's name."""

Begins = Callable[[Literal["forward", "recomputation", "backward"], str], None]
"""A function that is called with a pass and a module's name when that pass of the module begins."""

aten = torch.ops.aten


class _Call:
    """A call of a module's forward pass; `end` is the index of the first event after it."""

    __slots__ = ("end", "kind", "name")

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name, self.end = kind, name, -1


class _Event(NamedTuple):
    """An entry of the log.

    what: new, free (a storage); passing (memory that is allocated and freed at once); arrives (the gradient of a
        parameter is complete); begins (a part of the run, or a pass of a module).
    """

    what: Literal["new", "free", "passing", "arrives", "begins"]
    storage: int = -1
    size: int = 0
    component: str = ""
    call: _Call | None = None
    parameter: int = -1
    name: Any = None


@dataclass
class Moment:
    """The moment of a part of a run at which most bytes are live.

    Attributes:
        name: Name of the part, as passed to :meth:`EventLog.begin`.
        components: Live bytes by component.
    """

    name: Any
    components: dict[str, int] = field(default_factory=dict)


class EventLog(StorageWatch):
    """Logs the storages that are allocated and freed, and finds the component of each at the end.

    A storage belongs to the component that :meth:`assign` or :meth:`within` names. Otherwise it is an activation of the
    module whose forward pass allocated it if it outlives that forward pass, and a temporary if not.

    Args:
        device: Device whose operators the tensors stand for; for "cuda" their scratch memory is counted.

    Attributes:
        flops: Floating-point operations of matrix products, sparse products and attention so far.
    """

    def __init__(self, device: DeviceType) -> None:
        super().__init__(SCRATCH_BYTES if device == "cuda" else None)
        self.flops, self._part = 0, ""
        self._scopes = [""]
        self._device = device
        self._events: list[_Event] = []
        self._calls: list[_Call] = []
        self._backward_kind = "loss"
        self._number_by_key: dict[int, int] = {}
        self._assigned: dict[int, str] = {}
        self._ignored_new: set[int] = set()
        self._ignored_free: set[int] = set()
        self._shared: set[int] = set()
        self._next_number = 0
        self._sizes: dict[int, int] = {}

    # Events from the dispatcher

    def allocated(self, key: int, num_bytes: int) -> None:
        """See :class:`StorageWatch`."""
        self._number_by_key[key] = self._next_number
        self._new(self._next_number, num_bytes)
        self._next_number += 1

    def freed(self, key: int, num_bytes: int) -> None:
        """See :class:`StorageWatch`."""
        self._events.append(_Event("free", self._number_by_key.pop(key), num_bytes))

    def resized(self, key: int, before: int, after: int) -> None:
        """Logs a resized storage as one that is freed and another that is allocated, of the same component."""
        number = self._number_by_key[key]
        self._events.append(_Event("free", number, before))
        self.allocated(key, after)
        if number in self._assigned:
            self._assigned[self._number_by_key[key]] = self._assigned[number]

    def passing(self, num_bytes: int) -> None:
        """See :class:`StorageWatch`."""
        call = self._calls[-1] if self._calls else None
        kind = call.kind if call else self._backward_kind
        self._events.append(_Event("passing", -1, num_bytes, self._scopes[-1] or f"temporaries.{kind}"))

    def _new(self, number: int, num_bytes: int) -> None:
        call = self._calls[-1] if self._calls else None
        self._sizes[number] = num_bytes
        self._events.append(
            _Event("new", number, num_bytes, self._scopes[-1] or f"temporaries.{self._backward_kind}", call)
        )
        if self._scopes[-1]:
            self._assigned[number] = self._scopes[-1]

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator and counts its FLOPs. Reading a number from a fake tensor returns 1."""
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **kwargs)
        flops = FLOPS.get(func._overloadpacket)
        if flops is not None:
            self.flops += repetitions() * flops(*args, **kwargs, out_val=out)
        if func is aten._embedding_bag_forward_only.default and isinstance(out[0], FakeTensor):
            # CUDA returns the bag of every index, the CPU's kernel an empty tensor; fake tensors may do either.
            return (out[0], out[1].new_empty(0 if self._device == "cpu" else len(args[1])), *out[2:])
        return out

    # Components of storages

    def number(self, tensor: Tensor) -> int:
        """Returns the log's number of a tensor's storage."""
        return self._number_by_key[self._see(tensor)]

    def assign(self, tensors: Iterable[Tensor], component: str) -> None:
        """Assigns the storages of tensors to a component."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                self._assigned[self.number(tensor)] = component

    @contextmanager
    def within(self, component: str) -> Iterator[None]:
        """Assigns all storages that are allocated within the block to a component."""
        self.enter(component)
        try:
            yield
        finally:
            self.leave()

    def enter(self, component: str) -> None:
        """Assigns all storages that are allocated until :meth:`leave` to a component."""
        self._scopes.append(component)

    def leave(self) -> None:
        """Ends the scope that :meth:`enter` began."""
        self._scopes.pop()

    def take_over(self, tensor: Tensor, component: str) -> Tensor:
        """Ignores the allocation of a storage, which belongs to another recording; counts only that it is freed."""
        self.assign([tensor], component)
        self._ignored_new.add(self.number(tensor))
        return tensor

    def hand_over(self, tensor: Tensor, component: str) -> None:
        """Ignores that a storage is freed, which belongs to another recording; counts only its allocation."""
        self.assign([tensor], component)
        self._ignored_free.add(self.number(tensor))

    def share(self, tensor: Tensor, component: str) -> None:
        """Takes over a storage that all layers share. The last layer to use it frees it, in a step of its own."""
        self._shared.add(self.number(self.take_over(tensor, component)))

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Ignores storages that exist already and are counted elsewhere."""
        for tensor in tensors:
            self._ignored_new.add(self.number(tensor))
            self._ignored_free.add(self.number(tensor))

    def arrives(self, index: int, gradient: Tensor) -> None:
        """Logs that the gradient of a parameter is complete."""
        number = self.number(gradient)
        self._assigned[number] = "gradients"
        self._events.append(_Event("arrives", number, parameter=index))

    # Parts of the run

    def begin(self, name: Any) -> None:
        """Begins a part of the run."""
        self._events.append(_Event("begins", name=name))

    def begin_part(self, part: str) -> None:
        """Begins a part of the run, which :meth:`passes` returns as a :class:`Pass`."""
        self._part = part
        self.moment("")

    def moment(self, where: str) -> None:
        """Names the following events within the part."""
        self.begin((self._part, where))

    def watch(self, modules: Iterable[tuple[str, nn.Module]], begins: Begins) -> None:
        """Logs the forward passes of modules, and reports the beginning of each of their passes.

        Args:
            modules: Modules by name; those without a kind in :data:`KINDS` are skipped. What a module with an attribute
                `component` allocates in its forward pass belongs to that component.
            begins: Called when a forward pass, recomputation or backward pass of a module begins.
        """
        for name, module in modules:
            parts = name.split(".")
            kind = KINDS.get(parts[-2] if parts[-1].isdigit() else parts[-1])
            if kind is not None:
                module.register_forward_pre_hook(functools.partial(self._forward_begins, name, kind, begins))
                ends = functools.partial(self._forward_ends, name, kind, begins)
                module.register_forward_hook(ends, always_call=True)
            component = getattr(module, "component", None)
            if isinstance(component, str):
                module.register_forward_pre_hook(lambda *_, to=component: self.enter(to))
                module.register_forward_hook(lambda *_: self.leave())

    def _forward_begins(self, name: str, kind: str, begins: Begins, module: nn.Module, inputs: Any) -> None:
        recomputing = torch._C._current_graph_task_id() != -1
        self._calls.append(_Call(kind, name))
        begins("recomputation" if recomputing else "forward", name)

    def _forward_ends(self, name: str, kind: str, begins: Begins, module: nn.Module, inputs: Any, output: Any) -> None:
        self._calls.pop().end = len(self._events)
        if isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled():
            output.register_hook(lambda _: self._backward_begins(name, kind, begins))
        if self._calls:
            recomputing = torch._C._current_graph_task_id() != -1
            begins("recomputation" if recomputing else "forward", self._calls[-1].name)

    def _backward_begins(self, name: str, kind: str, begins: Begins) -> None:
        self._backward_kind = kind
        begins("backward", name)

    # Results

    def moments(self) -> list[Moment]:
        """Returns the largest moment of every part that :meth:`begin` began, in order."""
        components = self._components()
        live: dict[str, int] = {}
        total = most = 0
        found = [Moment(None)]
        for event in self._events:
            if event.what == "begins":
                found.append(Moment(event.name, dict(live)))
                most = total
            elif event.what in ("new", "passing"):
                component = components.get(event.storage, event.component)
                live[component] = live.get(component, 0) + event.size
                total += event.size
                if total > most:
                    most, found[-1].components = total, dict(live)
                if event.what == "passing":
                    live[component] -= event.size
                    total -= event.size
            elif event.what == "free":
                live[components[event.storage]] -= event.size
                total -= event.size
        return found

    def passes(self) -> dict[str, Pass]:
        """Returns what every part that :meth:`begin_part` began allocated and freed, by the part's name."""
        components = self._components()
        steps: dict[str, list[Step]] = {}
        gradients: dict[int, int] = {}
        part, writer = "", _StepWriter()
        for event in self._events:
            is_gradient = event.storage in gradients
            if event.what == "begins":
                name, where = event.name
                if name != part:
                    steps.setdefault(part, []).extend(writer.finish())
                    part, writer = name, _StepWriter()
                writer.where = where
            elif event.what in ("new", "passing") and event.storage not in self._ignored_new:
                component = components.get(event.storage, event.component)
                writer.add(component, event.size)
                if event.what == "passing":
                    writer.add(component, -event.size)
            elif event.what == "free" and event.storage not in self._ignored_free:
                if is_gradient:
                    writer.cut(released=gradients[event.storage])
                elif event.storage in self._shared:
                    writer.cut()
                    writer.add(components[event.storage], -event.size)
                    writer.cut(shared=True)
                else:
                    writer.add(components[event.storage], -event.size)
            elif event.what == "arrives":
                storage = gradients.setdefault(event.storage, len(gradients))
                writer.cut(arrives=(event.parameter, storage))
        steps.setdefault(part, []).extend(writer.finish())
        sizes = tuple(self._sizes[number] for number in gradients)
        return {
            name: Pass(tuple(some), sizes if any(step.arrives for step in some) else ()) for name, some in steps.items()
        }

    def _components(self) -> dict[int, str]:
        """Returns the component of every storage by its number."""
        ends = {event.storage: index for index, event in enumerate(self._events) if event.what == "free"}
        found = {}
        for event in self._events:
            if event.what != "new":
                continue
            component, call = event.component, event.call
            if event.storage in self._assigned:
                component = self._assigned[event.storage]
            elif call is not None:
                outlives = ends.get(event.storage, len(self._events)) >= call.end
                component = f"{'activations' if outlives else 'temporaries'}.{call.kind}"
            found[event.storage] = component
        return found


class _StepWriter:
    """Sums up consecutive events to steps."""

    def __init__(self) -> None:
        self.where = ""
        self._steps: list[Step] = []
        self._clear()

    def _clear(self) -> None:
        self._live: dict[str, int] = {}
        self._total = self._most = 0
        self._peak: Bytes = {}
        self._peak_where = ""

    def add(self, component: str, size: int) -> None:
        """Counts allocated bytes, or freed bytes if negative."""
        self._live[component] = self._live.get(component, 0) + size
        self._total += size
        if self._total > self._most:
            self._most, self._peak_where = self._total, self.where
            self._peak = {key: value for key, value in self._live.items() if value}

    def cut(self, arrives: tuple[int, int] | None = None, released: int | None = None, *, shared: bool = False) -> None:
        """Ends the current step; the arguments are those of :class:`Step`."""
        end = {key: value for key, value in self._live.items() if value}
        self._steps.append(Step(self._peak_where or self.where, self._peak, end, arrives, released, shared))
        self._clear()

    def finish(self) -> Sequence[Step]:
        """Returns all steps; the last one is left out if it is empty."""
        if self._live:
            self.cut()
        return self._steps
