"""An update of one device, or of whole replicas, gone through from beginning to end (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from sltrain_dist.config.rules import loss_chunk_tokens
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.block import RESIDUAL
from sltrain_dist.memory.device import Device
from sltrain_dist.memory.gradients import Arrivals
from sltrain_dist.memory.holdings import Holdings, holdings
from sltrain_dist.memory.operands import CAST_WEIGHTS
from sltrain_dist.memory.result import Phase, Point
from sltrain_dist.memory.sizes import Sizes, index_bytes, sizes
from sltrain_dist.memory.stretches import (
    block_backward,
    block_evaluation,
    block_forward,
    embedding_backward,
    ends_backward,
    ends_forward,
    received,
)
from sltrain_dist.memory.tape import Stretch
from sltrain_dist.memory.updates import StepMemory
from sltrain_dist.optim.state_layout import BLOCKS, Place, is_quantized
from sltrain_dist.parallel.partition import value_bytes

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
        self.step = StepMemory.of_run(config.optim, self.width, device.span, int8=config.reparam.weight_bits == 8)
        self.base: dict[str, int] = {}
        self.timeline: list[Point] = []

    def points(self) -> list[Point]:
        """The moments, in their order."""
        self.hold_parameters()
        self.init()
        self.hold_more()
        self.add("batch", self.batch_bytes(self.shapes))
        self.forward()
        self.backward()
        self.update()
        self.save()
        self.evaluate()
        return self.timeline

    # What lives all the time

    @cached_property
    def held(self) -> Holdings:
        """What this rank holds."""
        return holdings(self.shapes, "nothing", 1)

    @property
    def dealt_on_device(self) -> bool:
        """Whether what is dealt out lives there between its uses, with gradients and states."""
        return True

    @property
    def waits_whole(self) -> bool:
        """Whether gradients of what is dealt out wait whole between micro-batches."""
        return False

    @property
    def buckets(self) -> bool:
        """Whether DDP's buckets hold the gradients, all the time."""
        return self.config.parallel.engine == "ddp" and self.ranks > 1 and self.config.optim.update == "whole"

    def hold_parameters(self) -> None:
        """Parameters, index and the rotary table, and DDP's buckets."""
        config = self.config
        for group, values in self.held.by_group(with_dealt=self.dealt_on_device).items():
            self.add(group, values * self.width)
        for group, saved in self.held.int8_saving(self.width).items():
            self.add(group, -saved)
        if self.buckets:
            self.add("gradients", self.held.total_values * self.width)
        self.add("index", index_bytes(config.model, config.reparam))
        self.add("dense.rotary", 8 * config.data.seq_len * config.model.head_dim)

    def batch_bytes(self, shapes: Sizes) -> int:
        """Of ids and labels, int64, and positions where documents are told apart."""
        return (24 if self.config.data.reset_attention else 16) * shapes.ends.tokens

    def init(self) -> None:
        """Building the model and its engine."""
        self.point("init", "model and engine")

    def hold_more(self) -> None:
        """States, and gradients that wait for the last micro-batch."""
        optim, on_device = self.config.optim, self.dealt_on_device
        states, masters = self.held.states(optim, self.width, with_dealt=on_device)
        self.add("states", states)
        self.add("master_weights", masters)
        if self.passes > 1:
            waiting = self.held.waiting_values(whole=self.waits_whole, with_dealt=on_device)
            self.add("gradients", waiting * self.width)
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
        if config.data.reset_attention:  # a table and a mask of its own for every row
            self.add("activations.rotary", 2 * ends.widths.residual * ends.tokens * config.model.head_dim)
            self.add("activations.mask", ends.widths.compute * ends.tokens * config.data.seq_len)
        elif ends.widths.residual != 4:
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
        self.clear("activations.rotary", "activations.mask", "batch")
        if self.config.optim.update == "per_layer":
            self.point("update", "made in the backward pass")
            return
        taken = max(map(self.step.of_place, self.places), default=0)
        int8 = (item.parameter.shape for item in self.held.items if item.parameter.int8)
        taken = max(taken, max((self.step.of(shape, int8=True) for shape in int8), default=0))
        if self.config.optim.name == "sgd" and self.config.optim.weight_decay > 0:
            # torch's multi-tensor SGD, its default on a GPU, adds decay to copies of the gradients.
            taken = self.width * self.held.decaying_values(with_dealt=self.dealt_on_device)
        self.point("update", "step of the optimizer", {"temporaries.update": taken})

    @cached_property
    def places(self) -> list[Place]:
        """The different parts of parameters that this rank updates on the device."""
        return self.held.places(with_dealt=self.dealt_on_device)

    def save(self) -> None:
        """A checkpoint, which takes one tensor after the other to the host; quantized states as one code a byte."""
        if not self.buckets:
            self.clear("gradients")
        bits = self.config.optim.state_bits
        codes = (place.count for place in self.places if is_quantized(place.shape, bits))
        self.point("save", "checkpoint", {"temporaries.codes": max(codes, default=0) * (2 if bits == 4 else 1)})

    def evaluate(self) -> None:
        """Forward pass of an evaluation, of which nothing is kept."""
        evaluation = self.config.eval
        if evaluation.source is None:
            return
        shapes = sizes(self.config, self.device, micro_batch=evaluation.micro_batch)
        ends = shapes.ends
        before = dict(self.base)
        self.add("batch", self.batch_bytes(shapes))
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
        size += self.base.pop(component, 0)
        if size:
            self.base[component] = size

    def clear(self, *components: str) -> None:
        """Uncounts all bytes of some components."""
        for component in components:
            self.base.pop(component, None)

    def apply(self, phase: Phase, where: str, stretch: Stretch) -> None:
        """Goes through a stretch."""
        self.point(phase, ", ".join(part for part in (where, stretch.where) if part), stretch.peak)
        for component, size in stretch.end.items():
            self.add(component, size)

    def point(self, phase: Phase, where: str, more: Mapping[str, int] | None = None) -> None:
        """Records a moment at which more lives than what stays."""
        components = self.base.copy()
        if more:
            for component, size in more.items():
                components[component] = components.get(component, 0) + size
        self.timeline.append(Point(phase, where, components))
