"""An update under FSDP2 (no torch), as torch.distributed.fsdp's _fsdp_param_group.py and _fsdp_collectives.py make it.

A block's shards are gathered into one buffer and copied out to its parameters; on one rank they are only copied. In
the forward pass the buffer lives until the next block's is copied out. After a block's backward pass its gradients are
copied into one buffer for the reduce-scatter, which lives until the next block's.
"""

from __future__ import annotations

from functools import cached_property

from sltrain_dist.config.rules import accumulates_locally
from sltrain_dist.memory.gradients import Arrivals
from sltrain_dist.memory.holdings import Holdings, holdings
from sltrain_dist.memory.schedules.ddp import Timeline
from sltrain_dist.memory.stretches import (
    block_backward,
    block_forward,
    embedding_backward,
    ends_backward,
    ends_forward,
    received,
)

GATHERED, REDUCED = "buffers.gathered", "buffers.reduced"


class FsdpTimeline(Timeline):
    """Goes through an update of the engine `fsdp`, on its rank 0, which holds the most."""

    # Who holds what

    @property
    def shards(self) -> int:
        """Ranks that a parameter is dealt to."""
        return self.ranks // self.config.parallel.replicas

    @property
    def remainder_is_whole(self) -> bool:
        """Whether embedding, head and norms are whole on every rank."""
        return self.config.parallel.shard == "factors"

    @cached_property
    def held(self) -> Holdings:
        return holdings(self.shapes, self.config.parallel.shard, self.shards)

    @property
    def dealt_on_device(self) -> bool:
        return not self.config.parallel.cpu_offload

    @property
    def waits_whole(self) -> bool:
        return accumulates_locally(self.config.parallel)

    def init(self) -> None:
        """Shards get memory, and initial values are drawn into them in chunks on the host."""
        self.point("init", "shards, and what is whole on every rank")

    # An update

    def forward(self) -> None:
        parallel, shapes = self.config.parallel, self.shapes
        layers, ahead = len(shapes.order), parallel.prefetch_blocks
        block = self.held.gathered_in(block=True) * shapes.blocks[0].widths.parameter
        gather = block if self.shards > 1 else 0
        root = self.held.gathered_in(block=False) * self.width
        self.add(GATHERED, root + (root if self.shards > 1 else 0))
        self.begin_forward()
        for layer, kind in enumerate(shapes.order):
            # The buffer before, the root's at first, lives until this block's has been copied out.
            if layer == 0:
                coming, before = gather, 0
            else:
                coming, before = gather * min(ahead, layers - layer), gather
            self.point("forward", f"block {layer}, gathered", {GATHERED: before + coming + block})
            if layer == 0 and self.shards > 1:
                self.add(GATHERED, -root)
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
        block = self.held.gathered_in(block=True) * shapes.blocks[0].widths.parameter
        gather = block if self.shards > 1 else 0
        ends, arrivals = self.of_ends(), self.of_block()
        of_gains = ends if self.remainder_is_whole else None
        # The root, where it has parameters, prefetches the last block.
        early = gather if parallel.reshard_after_forward and not self.remainder_is_whole else 0
        self.add(GATHERED, early)
        stretch, waiting = ends_backward(shapes.ends, ends)
        self.apply("backward", "", stretch)
        self.add(GATHERED, -early)
        for layer, kind in reversed(list(enumerate(shapes.order))):
            prefetched = 0
            if parallel.reshard_after_forward:
                before = gather * (1 if layer == layers - 1 else min(ahead, layer + 1))
                self.point("backward", f"block {layer}, gathered", {GATHERED: before + block})
                self.add(GATHERED, block)
                prefetched = gather * min(ahead, layer)
            self.add(GATHERED, prefetched)
            stretch, waiting = block_backward(shapes.blocks[kind], arrivals, waiting, of_gains)
            self.apply("backward", f"block {layer}", stretch)
            self.add(GATHERED, -block)
            self._reduce(f"block {layer}", in_block=True)
            self.add(GATHERED, -prefetched)
        stretch, waiting = embedding_backward(shapes.ends, ends, waiting)
        self.apply("backward", "", stretch)
        if not self.remainder_is_whole:
            self.add(GATHERED, -self.held.gathered_in(block=False) * self.width)
            self._reduce("root", in_block=False)
        self.clear(REDUCED)
        self.apply("backward", "last updates", received(ends, waiting))
        if self.remainder_is_whole and self.ranks > 1 and self.config.optim.update == "whole":
            message = self.width * self.held.whole_values
            self.point("backward", "all-reduce of the dense remainder", {"buffers.messages": message})

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
        waits = self.passes > 1 and self.waits_whole
        return Arrivals("add" if waits and width == self.width else "keep", width)

    @cached_property
    def shard_steps(self) -> dict[bool, int]:
        """Bytes that an update takes of a shard of a block's parameters (true), or of the root's."""
        steps = {False: 0, True: 0}
        for item in self.held.dealt:
            steps[item.in_block] = max(steps[item.in_block], self.step.of_place(item.place))
        return steps

    def _reduce(self, where: str, *, in_block: bool) -> None:
        """Reduce-scatter of the gradients of a block, or the root; with per-layer updates, the update of its shards."""
        values = self.held.gathered_in(block=in_block)
        gradient_width = self.shapes.blocks[0].widths.parameter if in_block else self.width
        whole_values = self.held.dealt_in(block=in_block)
        local = self.passes > 1 and self.waits_whole
        self.clear(REDUCED)  # the one before
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
        if self.config.optim.update == "per_layer":
            step = self.shard_steps[in_block]
            self.point("backward", f"{where}, update of its shards", {"gradients": part, "temporaries.update": step})
            if waits_sharded:
                self.add("gradients", -part)
        elif waits_sharded or self.config.parallel.cpu_offload:
            self.point("backward", f"{where}, gradients added", {"gradients": part})
        else:
            self.add("gradients", part)
