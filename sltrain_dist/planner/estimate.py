"""What a run takes, in closed form (no torch): bytes by component at moments of an update, on the rank that needs most.

An update is gone through as training goes through it (train/step.py, parallel/), with the optimizer's states there and,
where an update has several micro-batches, the last one. Formulas and sources: docs/planner.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config, OptimConfig
from sltrain_dist.models.count import count_parameters
from sltrain_dist.optim.state_layout import MASTER, Place, stored_states, whole
from sltrain_dist.parallel.communication import update_traffic
from sltrain_dist.parallel.partition import value_bytes
from sltrain_dist.planner.block import RESIDUAL
from sltrain_dist.planner.device import CUDA, Device, reserved_bytes
from sltrain_dist.planner.flops import flops_per_token
from sltrain_dist.planner.gradients import Arrivals
from sltrain_dist.planner.result import Estimate, Phase, Point
from sltrain_dist.planner.sizes import Sizes, index_bytes, sizes
from sltrain_dist.planner.stretches import (
    block_backward,
    block_forward,
    embedding_backward,
    ends_backward,
    ends_forward,
)
from sltrain_dist.planner.tape import Stretch
from sltrain_dist.planner.updates import StepMemory

_IN_FLIGHT_BYTES = 1 << 25
"""As parallel/in_backward.py."""
_RELATIVE_ERROR = 0.05


def estimate(config: Config, *, ranks: int = 1, device: Device = CUDA) -> Estimate:
    """Estimates a run in closed form.

    Args:
        config: The run.
        ranks: World size.
        device: What it runs on.

    Raises:
        ConfigError: The configuration cannot be run on so many ranks.
    """
    passes = micro_batches_per_update(config, ranks)
    shapes = sizes(config, device)
    timeline = Timeline(config, shapes, ranks, passes, device)
    points = timeline.points()
    peak = max(point.total for point in points)
    tensors = 3 * sum(1 for _ in shapes.block_parameters) * len(shapes.order)
    return Estimate(
        timeline=tuple(points),
        reserved_bytes=reserved_bytes(peak, tensors),
        parameters=count_parameters(config.model, config.reparam).total,
        flops_per_token=flops_per_token(config, shapes),
        comm_bytes_per_update=round(update_traffic(config, ranks).total),
        relative_error=_RELATIVE_ERROR,
    )


class Timeline:
    """Goes through an update of the engine `ddp`.

    Args:
        config: The run.
        shapes: Its sizes.
        ranks: World size.
        passes: Micro-batches of an update.
        device: What it runs on.
    """

    def __init__(self, config: Config, shapes: Sizes, ranks: int, passes: int, device: Device) -> None:
        self.config, self.shapes, self.ranks, self.passes, self.device = config, shapes, ranks, passes, device
        self.width = value_bytes(config)
        self.step = StepMemory(config.optim, self.width, device.span)
        self.base: dict[str, int] = {}
        self.timeline: list[Point] = []

    def points(self) -> list[Point]:
        """The moments, in their order."""
        self.hold()
        self.point("init", "model and optimizer")
        self.add("batch", 16 * self.shapes.ends.tokens)
        self.forward()
        self.backward()
        self.update()
        return self.timeline

    # What lives all the time

    def hold(self) -> None:
        """Parameters, states, index and the rotary table; gradients that wait, and DDP's buckets."""
        config, total = self.config, 0
        for count, parameters in (
            (len(self.shapes.order), self.shapes.block_parameters),
            (1, self.shapes.end_parameters),
        ):
            for parameter in parameters:
                total += count * parameter.values * self.width
                self.add(parameter.group, count * parameter.values * self.width)
                states, masters = _state_bytes(whole("", parameter.shape), config.optim, self.width)
                self.add("states", count * states)
                self.add("master_weights", count * masters)
        self.add("index", index_bytes(config.model, config.reparam))
        self.add("dense.rotary", 8 * config.data.seq_len * config.model.head_dim)
        buckets = self.ranks > 1 and config.optim.update == "whole"
        if buckets:
            self.add("gradients", total)
        if self.passes > 1:
            self.add("gradients", total)

    @property
    def arrivals(self) -> Arrivals:
        """What becomes of the gradients of the last micro-batch."""
        if self.config.optim.update == "per_layer":
            in_flight = _IN_FLIGHT_BYTES if self.ranks > 1 else None
            return Arrivals("step", self.width, self.step, in_flight, held=self.passes > 1)
        return Arrivals("add" if self.ranks > 1 or self.passes > 1 else "keep", self.width)

    # An update

    def forward(self) -> None:
        """Forward pass of the last micro-batch."""
        ends = self.shapes.ends
        self.add(RESIDUAL, ends.tokens * ends.hidden * ends.widths.residual)
        if ends.widths.residual != 4:
            self.add(
                "activations.rotary", 2 * ends.widths.residual * self.config.data.seq_len * self.config.model.head_dim
            )
        for layer, kind in enumerate(self.shapes.order):
            self.apply("forward", f"block {layer}", block_forward(self.shapes.blocks[kind]))
        self.apply("forward", "", ends_forward(ends))

    def backward(self) -> None:
        """Its backward pass."""
        arrivals = self.arrivals
        stretch, waiting = ends_backward(self.shapes.ends, arrivals)
        self.apply("backward", "", stretch)
        for layer, kind in reversed(list(enumerate(self.shapes.order))):
            stretch, waiting = block_backward(self.shapes.blocks[kind], arrivals, waiting)
            self.apply("backward", f"block {layer}", stretch)
        self.apply("backward", "", embedding_backward(self.shapes.ends, arrivals, waiting))

    def update(self) -> None:
        """The optimizer's step, where it has not been made."""
        if self.config.optim.update == "per_layer":
            self.point("update", "made in the backward pass")
            return
        shapes = {p.shape for p in (*self.shapes.block_parameters, *self.shapes.end_parameters)}
        self.point("update", "step of the optimizer", {"temporaries.optimizer": max(self.step.of(s) for s in shapes)})

    # Bookkeeping

    def add(self, component: str, size: int) -> None:
        """Counts bytes that stay, or, negative, go."""
        self.base[component] = self.base.get(component, 0) + size

    def apply(self, phase: Phase, where: str, stretch: Stretch) -> None:
        """Goes through a stretch."""
        self.point(phase, ", ".join(part for part in (where, stretch.where) if part), stretch.peak)
        for component, size in stretch.end.items():
            self.add(component, size)

    def point(self, phase: Phase, where: str, more: Mapping[str, int] | None = None) -> None:
        """Records a moment at which more lives than what stays."""
        components = dict(self.base)
        for component, size in (more or {}).items():
            components[component] = components.get(component, 0) + size
        self.timeline.append(Point(phase, where, {k: v for k, v in components.items() if v}))


@lru_cache(maxsize=65536)
def _state_bytes(place: Place, optim: OptimConfig, width: int) -> tuple[int, int]:
    """(states, fp32 copies)."""
    stored = stored_states(place, optim, width)
    masters = sum(state.nbytes for state in stored if state.key == MASTER)
    return sum(state.nbytes for state in stored) - masters, masters
