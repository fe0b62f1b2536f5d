"""An update under FSDP2 (no torch), as torch.distributed.fsdp's _fsdp_param_group.py and _fsdp_collectives.py make it.

A block's shards are gathered into one buffer and copied out to its parameters; on one rank they are only copied. In
the forward pass the buffer lives until the next block's is copied out. After a block's backward pass its gradients are
copied into one buffer for the reduce-scatter, which lives until the next block's.
"""

from __future__ import annotations

from functools import cached_property
from math import prod

from sltrain_dist.config.rules import accumulates_locally
from sltrain_dist.optim.state_layout import Place, whole
from sltrain_dist.parallel.partition import fsdp_place
from sltrain_dist.planner.gradients import Arrivals, Parameter
from sltrain_dist.planner.stretches import (
    block_backward,
    block_forward,
    embedding_backward,
    ends_backward,
    ends_forward,
    received,
)
from sltrain_dist.planner.timeline import Timeline

GATHERED, REDUCED = "buffers.gathered", "buffers.reduced"


class FsdpTimeline(Timeline):
    """Goes through an update of the engine `fsdp`, on its rank 0, which holds the most."""

    # Who holds what

    @cached_property
    def shards(self) -> int:
        """Ranks that a parameter is dealt to."""
        return self.ranks // self.config.parallel.replicas

    @cached_property
    def remainder_is_whole(self) -> bool:
        """Whether embedding, head and norms are whole on every rank."""
        return self.config.parallel.shard == "factors"

    def is_sharded(self, parameter: Parameter, *, in_block: bool) -> bool:
        """Whether a parameter is dealt out."""
        return not self.remainder_is_whole or (in_block and len(parameter.shape) > 1) or parameter.group != "dense"

    def place(self, parameter: Parameter, *, in_block: bool) -> Place:
        """What rank 0 holds of it."""
        if self.is_sharded(parameter, in_block=in_block):
            return fsdp_place("", parameter.shape, 0, self.shards)
        return whole("", parameter.shape)

    def held_values(self, parameter: Parameter, *, in_block: bool) -> int:
        """The same in values, with the rows' padding."""
        if self.is_sharded(parameter, in_block=in_block):
            return -(-parameter.shape[0] // self.shards) * prod(parameter.shape[1:])
        return parameter.values

    def on_device(self, parameter: Parameter, *, in_block: bool) -> bool:
        """With offloading what is sharded lives in the host's memory."""
        return not (self.config.parallel.cpu_offload and self.is_sharded(parameter, in_block=in_block))

    def waiting_values(self, parameter: Parameter, *, in_block: bool) -> int:
        """Values of a gradient that waits between micro-batches."""
        if accumulates_locally(self.config.parallel):
            held = self.held_values(parameter, in_block=in_block)
            return parameter.values if self.is_sharded(parameter, in_block=in_block) else held
        return super().waiting_values(parameter, in_block=in_block)

    def _values(self, *, in_block: bool) -> int:
        """Padded values of what a block's, or the root's, all-gather brings together."""
        return (self._of_block if in_block else self._of_root)[0]

    @cached_property
    def _of_block(self) -> tuple[int, int, int]:
        return self._measure(in_block=True)

    @cached_property
    def _of_root(self) -> tuple[int, int, int]:
        return self._measure(in_block=False)

    def _measure(self, *, in_block: bool) -> tuple[int, int, int]:
        """Of a block's, or the root's, sharded parameters: (padded values, values, largest step of a shard)."""
        parameters = self.shapes.block_parameters if in_block else self.shapes.end_parameters
        sharded = [p for p in parameters if self.is_sharded(p, in_block=in_block)]
        return (
            self.shards * sum(self.held_values(p, in_block=in_block) for p in sharded),
            sum(p.values for p in sharded),
            max((self.step.of_place(self.place(p, in_block=in_block)) for p in sharded), default=0),
        )

    def init(self) -> None:
        """The model is built whole on every rank, and lives until all of it has been dealt out."""
        sharded = (
            (parameter, count)
            for parameter, count, in_block in self.parameters
            if self.is_sharded(parameter, in_block=in_block)
        )
        built = self.width * sum(count * parameter.values for parameter, count in sharded)
        self.point("init", "shards, and the whole model that they are cut from", {"buffers.unsharded_model": built})

    # An update

    def forward(self) -> None:
        parallel, shapes = self.config.parallel, self.shapes
        layers, ahead = len(shapes.order), parallel.prefetch_blocks
        block = self._values(in_block=True) * shapes.blocks[0].widths.parameter
        gather = block if self.shards > 1 else 0
        root = self._values(in_block=False) * self.width
        self.add(GATHERED, root + (root if self.shards > 1 else 0))
        self.begin_forward()
        for layer, kind in enumerate(shapes.order):
            if layer == 0 and self.shards > 1:
                self.add(GATHERED, -root)  # the root's buffer
            before = gather * (1 if layer == 0 else min(ahead, layers - layer))
            self.point("forward", f"block {layer}, gathered", {GATHERED: before + block})
            during = gather * (1 + min(ahead, layers - 1 - layer))
            self.add(GATHERED, during + block)
            self.apply("forward", f"block {layer}", block_forward(shapes.blocks[kind]))
            self.add(GATHERED, -during - (block if parallel.reshard_after_forward else 0))
        self.add(GATHERED, gather)
        self.apply("forward", "", ends_forward(shapes.ends))
        self.leave_autocast()
        self.add(GATHERED, -gather)

    def backward(self) -> None:
        parallel, shapes = self.config.parallel, self.shapes
        layers, ahead = len(shapes.order), parallel.prefetch_blocks
        block = self._values(in_block=True) * shapes.blocks[0].widths.parameter
        gather = block if self.shards > 1 else 0
        ends, arrivals = self.of_ends(), self.of_block()
        stretch, waiting = ends_backward(shapes.ends, ends)
        self.apply("backward", "", stretch)
        for layer, kind in reversed(list(enumerate(shapes.order))):
            prefetched = 0
            if parallel.reshard_after_forward:
                before = gather * (1 if layer == layers - 1 else min(ahead, layer + 1))
                self.point("backward", f"block {layer}, gathered", {GATHERED: before + block})
                self.add(GATHERED, block)
                prefetched = gather * min(ahead, layer)
            self.add(GATHERED, prefetched)
            stretch, _ = block_backward(shapes.blocks[kind], arrivals)
            self.apply("backward", f"block {layer}", stretch)
            self.add(GATHERED, -block)
            self._reduce(f"block {layer}", in_block=True)
            self.add(GATHERED, -prefetched)
        stretch, waiting = embedding_backward(shapes.ends, ends, waiting)
        self.apply("backward", "", stretch)
        if not self.remainder_is_whole:
            self.add(GATHERED, -self._values(in_block=False) * self.width)
            self._reduce("root", in_block=False)
        self.base.pop(REDUCED, None)
        self.apply("backward", "last updates", received(ends, waiting))
        if self.remainder_is_whole and self.ranks > 1 and self.config.optim.update == "whole":
            message = self.width * self._remainder_values()
            self.point("backward", "all-reduce of the dense remainder", {"buffers.messages": message})

    def _remainder_values(self) -> int:
        gains = 2 * len(self.shapes.order) * self.shapes.ends.hidden
        return gains + sum(parameter.values for parameter in self.shapes.end_parameters)

    def of_ends(self) -> Arrivals:
        """What becomes of gradients of embedding, last norm and head."""
        if self.remainder_is_whole:
            return self.arrivals
        return self.unsharded(self.width)

    def of_block(self) -> Arrivals:
        """What becomes of a block's gradients: they wait, whole, for its reduce-scatter."""
        return self.unsharded(self.shapes.blocks[0].widths.parameter)

    def unsharded(self, width: int) -> Arrivals:
        """Added to those of earlier micro-batches, where these wait whole and in the same type."""
        waits = self.passes > 1 and accumulates_locally(self.config.parallel)
        return Arrivals("add" if waits and width == self.width else "keep", width)

    def _reduce(self, where: str, *, in_block: bool) -> None:
        """Reduce-scatter of the gradients of a block, or the root; with per-layer updates, the update of its shards."""
        config, shapes = self.config, self.shapes
        values, whole_values, step = self._of_block if in_block else self._of_root
        gradient_width = shapes.blocks[0].widths.parameter if in_block else self.width
        local = self.passes > 1 and accumulates_locally(config.parallel)
        self.base[REDUCED] = 0  # the one before
        self.point("backward", f"{where}, gradients copied for their reduce-scatter", {REDUCED: values * self.width})
        if self.unsharded(gradient_width).kind == "keep":
            self.add("gradients", -whole_values * gradient_width)
        if local:
            self.add("gradients", -whole_values * self.width)
        self.add(REDUCED, values * self.width)
        part = values * self.width // self.shards
        if self.shards == 1:
            self.point("backward", f"{where}, gradients copied", {REDUCED: part, "gradients": part})
        waits_sharded = self.passes > 1 and not local
        if config.optim.update == "per_layer":
            self.point("backward", f"{where}, update of its shards", {"gradients": part, "temporaries.update": step})
            if waits_sharded:
                self.add("gradients", -part)
        elif waits_sharded or config.parallel.cpu_offload:
            self.point("backward", f"{where}, gradients added", {"gradients": part})
        else:
            self.add("gradients", part)
