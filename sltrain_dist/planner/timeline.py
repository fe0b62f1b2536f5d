"""An update of one device, or of whole replicas, gone through from beginning to end (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from sltrain_dist.config.rules import loss_chunk_tokens
from sltrain_dist.config.schema import Config, OptimConfig
from sltrain_dist.optim.state_layout import BLOCKS, MASTER, Place, is_quantized, stored_states, whole
from sltrain_dist.parallel.partition import value_bytes
from sltrain_dist.planner.block import RESIDUAL
from sltrain_dist.planner.device import Device
from sltrain_dist.planner.gradients import Arrivals, Parameter
from sltrain_dist.planner.linear import CAST_WEIGHTS
from sltrain_dist.planner.result import Phase, Point
from sltrain_dist.planner.sizes import Sizes, index_bytes, sizes
from sltrain_dist.planner.stretches import (
    block_backward,
    block_evaluation,
    block_forward,
    embedding_backward,
    ends_backward,
    ends_forward,
    received,
)
from sltrain_dist.planner.tape import Stretch
from sltrain_dist.planner.updates import StepMemory

_IN_FLIGHT_BYTES = 1 << 25
"""As parallel/in_backward.py."""
_LEVELS_BYTES = 1 << 16
"""Of a quantizer's table (numerics/blockwise.py), of which there are two; beside it are levels and borders."""


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
        self.peaks_only = False
        """Whether only moments are recorded that exceed all earlier ones of their phase, which is faster."""
        self.largest: dict[Phase, int] = {}

    def points(self) -> list[Point]:
        """The moments, in their order."""
        self.hold_parameters()
        self.init()
        self.hold_more()
        self.add("batch", 16 * self.shapes.ends.tokens)
        self.forward()
        self.backward()
        self.update()
        self.save()
        self.evaluate()
        return self.timeline

    # What lives all the time

    def place(self, parameter: Parameter, *, in_block: bool) -> Place:
        """What this rank holds of a parameter of a block, or of embedding, last norm and head."""
        return whole("", parameter.shape)

    def held_values(self, parameter: Parameter, *, in_block: bool) -> int:
        """The same in values, with padding."""
        return parameter.values

    def waiting_values(self, parameter: Parameter, *, in_block: bool) -> int:
        """Values of its gradient that wait between two micro-batches."""
        return self.held_values(parameter, in_block=in_block)

    def on_device(self, parameter: Parameter, *, in_block: bool) -> bool:
        """Whether it lives there between its uses, with gradient and states."""
        return True

    @property
    def parameters(self) -> list[tuple[Parameter, int, bool]]:
        """(parameter, how often there is one like it, whether in blocks)."""
        shapes = self.shapes
        return [
            *((parameter, len(shapes.order), True) for parameter in shapes.block_parameters),
            *((parameter, 1, False) for parameter in shapes.end_parameters),
        ]

    @property
    def buckets(self) -> bool:
        """Whether DDP's buckets hold the gradients, all the time."""
        return self.config.parallel.engine == "ddp" and self.ranks > 1 and self.config.optim.update == "whole"

    def hold_parameters(self) -> None:
        """Parameters, index and the rotary table, and DDP's buckets."""
        config = self.config
        for parameter, count, in_block in self.parameters:
            if self.buckets:
                self.add("gradients", count * parameter.values * self.width)
            if self.on_device(parameter, in_block=in_block):
                self.add(parameter.group, count * self.held_values(parameter, in_block=in_block) * self.width)
        self.add("index", index_bytes(config.model, config.reparam))
        self.add("dense.rotary", 8 * config.data.seq_len * config.model.head_dim)

    def init(self) -> None:
        """Building the model and its engine."""
        self.point("init", "model and engine")

    def hold_more(self) -> None:
        """States, and gradients that wait for the last micro-batch."""
        optim = self.config.optim
        for parameter, count, in_block in self.parameters:
            if self.on_device(parameter, in_block=in_block):
                states, masters = _state_bytes(self.place(parameter, in_block=in_block), optim, self.width)
                self.add("states", count * states)
                self.add("master_weights", count * masters)
                if self.passes > 1:
                    self.add("gradients", count * self.waiting_values(parameter, in_block=in_block) * self.width)
        if optim.state_bits in BLOCKS:
            self.add("temporaries.levels", 2 * (_LEVELS_BYTES + 8 * 2**optim.state_bits))

    @property
    def arrivals(self) -> Arrivals:
        """What becomes of the last micro-batch's gradients of parameters that are whole on every rank."""
        several = self.passes > 1
        if self.config.optim.update == "per_layer":
            in_flight = _IN_FLIGHT_BYTES if self.ranks > 1 else None
            return Arrivals("step", self.width, self.step, in_flight, held=several)
        return Arrivals("add" if self.buckets or several else "keep", self.width, held=self.buckets and several)

    # An update

    def forward(self) -> None:
        """Forward pass of the last micro-batch."""
        self.begin_forward()
        for layer, kind in enumerate(self.shapes.order):
            self.apply("forward", f"block {layer}", block_forward(self.shapes.blocks[kind]))
        self.apply("forward", "", ends_forward(self.shapes.ends))
        self.leave_autocast()

    def leave_autocast(self) -> None:
        """Its cache of cast weights is cleared; those of blocks that are computed again were kept by nothing else."""
        for kind in self.shapes.order:
            block = self.shapes.blocks[kind]
            if block.recompute != "nothing":
                self.add(CAST_WEIGHTS, -block_forward(block).end.get(CAST_WEIGHTS, 0))

    def begin_forward(self) -> None:
        """Embedding, and the rotary table in the residual stream's type."""
        config, ends = self.config, self.shapes.ends
        self.add(RESIDUAL, ends.tokens * ends.hidden * ends.widths.residual)
        if ends.widths.residual != 4:
            self.add("activations.rotary", 2 * ends.widths.residual * config.data.seq_len * config.model.head_dim)

    def backward(self) -> None:
        """Its backward pass."""
        arrivals = self.arrivals
        stretch, waiting = ends_backward(self.shapes.ends, arrivals)
        self.apply("backward", "", stretch)
        for layer, kind in reversed(list(enumerate(self.shapes.order))):
            stretch, waiting = block_backward(self.shapes.blocks[kind], arrivals, waiting)
            self.apply("backward", f"block {layer}", stretch)
        stretch, waiting = embedding_backward(self.shapes.ends, arrivals, waiting)
        self.apply("backward", "", stretch)
        self.apply("backward", "last updates", received(arrivals, waiting))

    def update(self) -> None:
        """The optimizer's step, where it has not been made."""
        self.base["activations.rotary"] = self.base["batch"] = 0
        if self.config.optim.update == "per_layer":
            self.point("update", "made in the backward pass")
            return
        self.point(
            "update", "step of the optimizer", {"temporaries.update": max(map(self.step.of_place, self.places()))}
        )

    def places(self) -> list[Place]:
        """The different parts of parameters that this rank has on the device."""
        return list(
            dict.fromkeys(
                self.place(parameter, in_block=in_block)
                for parameter, _, in_block in self.parameters
                if self.on_device(parameter, in_block=in_block)
            )
        )

    def save(self) -> None:
        """A checkpoint, which takes one tensor after the other to the host; quantized states as one code a byte."""
        if not self.buckets:
            self.base["gradients"] = 0
        bits = self.config.optim.state_bits
        codes = (place.count for place in self.places() if is_quantized(place.shape, bits))
        self.point("save", "checkpoint", {"temporaries.codes": max(codes, default=0) * (2 if bits == 4 else 1)})

    def evaluate(self) -> None:
        """Forward pass of an evaluation, of which nothing is kept."""
        evaluation = self.config.eval
        if evaluation.source is None:
            return
        shapes = sizes(self.config, self.device, micro_batch=evaluation.micro_batch)
        ends = shapes.ends
        before = dict(self.base)
        self.add("batch", 16 * ends.tokens)
        self.begin_forward()
        block = max((block_evaluation(block) for block in shapes.blocks), key=lambda stretch: stretch.peak_total)
        self.point("forward", "evaluation, a block", block.peak)
        tokens = min(ends.tokens, loss_chunk_tokens(self.config) or ends.tokens)
        narrow = ends.widths.compute < 4
        logits = tokens * ends.vocabulary * (ends.widths.compute + 4 + (4 if narrow else 0))
        self.point("forward", "evaluation, loss", {"temporaries.logits": logits})
        self.base = before

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
        if self.peaks_only:
            total = sum(self.base.values()) + (sum(more.values()) if more else 0)
            if total <= self.largest.get(phase, -1):
                return
            self.largest[phase] = total
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


def state_bytes_of(shape: tuple[int, ...], optim: OptimConfig, width: int) -> int:
    """Bytes of the states of a whole parameter."""
    return sum(_state_bytes(whole("", shape), optim, width))
