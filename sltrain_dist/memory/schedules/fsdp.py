"""An update under FSDP2 (no torch), as torch.distributed.fsdp's _fsdp_param_group.py and _fsdp_collectives.py make it.

A layer's shards are gathered into one buffer and copied out to its parameters; on one rank they are only copied. In
the forward pass the buffer lives until the next layer's is copied out. After a layer's backward pass its gradients are
copied into one buffer for the reduce-scatter, which lives until the next layer's.
"""

from __future__ import annotations

from functools import cached_property

from sltrain_dist.memory.holdings import Holdings, holdings
from sltrain_dist.memory.ledger import Gradients, play, receive_all
from sltrain_dist.memory.schedules.ddp import Timeline

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

    @property
    def gathered_width(self) -> int:
        """Bytes of a value of a layer's parameters as they are gathered: mixed precision gathers them in bf16."""
        return self.config.train.precision.product_bytes

    @cached_property
    def held(self) -> Holdings:
        return holdings(self.model, self.config.parallel.shard, self.shards)

    @property
    def dealt_on_device(self) -> bool:
        return not self.config.parallel.cpu_offload

    @property
    def waits_whole(self) -> bool:
        return self.config.parallel.accumulates_locally

    def init(self) -> None:
        """Shards get memory, and initial values are drawn into them in chunks on the host."""
        self.point("init", "shards, and what is whole on every rank")

    # An update

    def forward(self) -> None:
        parallel, model = self.config.parallel, self.model
        layers, ahead = len(model.order), parallel.prefetch_blocks
        block = self.held.gathered_in(layer=True) * self.gathered_width
        gather = block if self.shards > 1 else 0
        root = self.held.gathered_in(layer=False) * self.width
        self.add(GATHERED, root + (root if self.shards > 1 else 0))
        self.apply("forward", "", play(model.ends, "embedding"))
        for layer, kind in enumerate(model.order):
            # The buffer before, the root's at first, lives until this layer's has been copied out.
            if layer == 0:
                coming, before = gather, 0
            else:
                coming, before = gather * min(ahead, layers - layer), gather
            self.point("forward", f"layer {layer}, gathered", {GATHERED: before + coming + block})
            if layer == 0 and self.shards > 1:
                self.add(GATHERED, -root)
            during = gather * (1 + min(ahead, layers - 1 - layer))
            self.add(GATHERED, during + block)
            self.apply("forward", f"layer {layer}", play(model.layers[kind], "forward"))
            self.add(GATHERED, -during - (block if parallel.reshard_after_forward else 0))
        self.add(GATHERED, gather)
        self.apply("forward", "", play(model.ends, "loss"))
        self.leave_autocast()
        self.add(GATHERED, -gather)

    @property
    def gathered_in_evaluation(self) -> int:
        """A layer (without resharding: all) with its buffer, those that are prefetched, and the root, which stays."""
        layer = self.held.gathered_in(layer=True) * self.gathered_width
        ahead = min(self.config.parallel.prefetch_blocks, len(self.model.order) - 1)
        buffers = layer * (1 + ahead) if self.shards > 1 else 0
        kept = 1 if self.config.parallel.reshard_after_forward else len(self.model.order)
        return layer * kept + buffers + self.held.gathered_in(layer=False) * self.width

    def backward(self) -> None:
        parallel, model = self.config.parallel, self.model
        layers, ahead = len(model.order), parallel.prefetch_blocks
        block = self.held.gathered_in(layer=True) * self.gathered_width
        gather = block if self.shards > 1 else 0
        ends, of_layer = self.gradients_of_ends(), self.unsharded(self.gathered_width)
        of_remainder = ends if self.remainder_is_whole else None
        # The root, where it has parameters, prefetches the last layer.
        early = gather if parallel.reshard_after_forward and not self.remainder_is_whole else 0
        self.add(GATHERED, early)
        played = play(model.ends, "loss backward", ends)
        self.apply("backward", "", played)
        self.add(GATHERED, -early)
        for layer, kind in reversed(list(enumerate(model.order))):
            prefetched = 0
            if parallel.reshard_after_forward:
                before = gather * (1 if layer == layers - 1 else min(ahead, layer + 1))
                self.point("backward", f"layer {layer}, gathered", {GATHERED: before + block})
                self.add(GATHERED, block)
                prefetched = gather * min(ahead, layer)
            self.add(GATHERED, prefetched)
            played = play(model.layers[kind], "backward", of_layer, played.in_flight, of_remainder, last=layer == 0)
            self.apply("backward", f"layer {layer}", played)
            self.add(GATHERED, -block)
            self._reduce(f"layer {layer}", in_layer=True)
            self.add(GATHERED, -prefetched)
        played = play(model.ends, "embedding backward", ends, played.in_flight)
        self.apply("backward", "", played)
        if not self.remainder_is_whole:
            self.add(GATHERED, -self.held.gathered_in(layer=False) * self.width)
            self._reduce("root", in_layer=False)
        self.clear(REDUCED)
        self.apply("backward", "last updates", receive_all(ends, played.in_flight))
        if self.remainder_is_whole and self.ranks > 1 and self.config.optim.update == "whole":
            message = self.width * self.held.whole_values
            self.point("backward", "all-reduce of the dense remainder", {"buffers.messages": message})

    def gradients_of_ends(self) -> Gradients:
        """What becomes of gradients of embedding, last norm and head."""
        if self.remainder_is_whole:
            return self.gradients
        return self.unsharded(self.width)

    def unsharded(self, width: int) -> Gradients:
        """Added to those of earlier micro-batches, where these wait whole and in the same type."""
        waits = self.passes > 1 and self.waits_whole
        return Gradients("add" if waits and width == self.width else "keep", width)

    @cached_property
    def shard_steps(self) -> dict[bool, int]:
        """Bytes that an update takes of a shard of a layer's parameters (true), or of the root's."""
        steps = {False: 0, True: 0}
        for item in self.held.dealt:
            steps[item.in_layer] = max(steps[item.in_layer], self.step_bytes(item))
        return steps

    def _reduce(self, where: str, *, in_layer: bool) -> None:
        """Reduce-scatter of the gradients of a layer, or the root; with per-layer updates, the update of its shards."""
        values = self.held.gathered_in(layer=in_layer)
        gradient_width = self.gathered_width if in_layer else self.width
        whole_values = self.held.dealt_in(layer=in_layer)
        local = self.passes > 1 and self.waits_whole
        self.clear(REDUCED)  # the one before
        self.point("backward", f"{where}, gradients copied for their reduce-scatter", {REDUCED: values * self.width})
        if self.unsharded(gradient_width).use == "keep":
            self.add("gradients", -whole_values * gradient_width)
        if local:
            self.add("gradients", -whole_values * self.width)
        self.add(REDUCED, values * self.width)
        part = values * self.width // self.shards
        if self.shards == 1:
            self.point("backward", f"{where}, gradients copied", {REDUCED: part, "gradients": part})
        waits_sharded = self.passes > 1 and not local
        if self.config.optim.update == "per_layer":
            step = self.shard_steps[in_layer]
            self.point("backward", f"{where}, update of its shards", {"gradients": part, "temporaries.update": step})
            if waits_sharded:
                self.add("gradients", -part)
        elif waits_sharded or self.config.parallel.cpu_offload:
            self.point("backward", f"{where}, gradients added", {"gradients": part})
        else:
            self.add("gradients", part)
