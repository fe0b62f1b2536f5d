"""The memory of an update under FSDP2, after torch's _fsdp_param_group.py and _fsdp_collectives.py (no torch).

A layer's shards are gathered into one buffer and copied out to its parameters; on one rank they are only copied. In
the forward pass the buffer lives until the next layer's buffer is copied out. After a layer's backward pass its
gradients are copied into one buffer for the reduce-scatter, which lives until the next layer's reduce-scatter.
"""

from __future__ import annotations

from functools import cached_property

from sltrain_dist.memory.holdings import Holdings, holdings_of
from sltrain_dist.memory.ledger import Gradients, play, use_in_flight
from sltrain_dist.memory.schedules.ddp import Timeline

GATHERED, REDUCED = "buffers.gathered", "buffers.reduced"


class FsdpTimeline(Timeline):
    """The live bytes over one update of the engine `fsdp`, on rank 0, which stores the most."""

    # Sharding

    @property
    def shards(self) -> int:
        """Number of ranks that a parameter is sharded over."""
        return self.ranks // self.config.parallel.replicas

    @property
    def remainder_is_whole(self) -> bool:
        """Whether embedding, head and norms are whole on every rank."""
        return self.config.parallel.shard == "factors"

    @property
    def gathered_width(self) -> int:
        """Bytes of a value of a layer's gathered parameters: mixed precision gathers in bf16."""
        return self.config.train.precision.product_bytes

    @cached_property
    def holdings(self) -> Holdings:
        return holdings_of(self.model, self.config.parallel.shard, self.shards)

    @property
    def shards_on_device(self) -> bool:
        return not self.config.parallel.cpu_offload

    @property
    def accumulates_whole(self) -> bool:
        return self.config.parallel.accumulates_locally

    def init(self) -> None:
        """Plays the allocation of the shards; initial values are drawn in chunks on the host."""
        self.point("init", "shards, and unsharded parameters")

    # An update

    def forward(self) -> None:
        parallel, model = self.config.parallel, self.model
        layers, ahead = len(model.order), parallel.prefetch_blocks
        layer_bytes = self.holdings.gathered_in(layer=True) * self.gathered_width
        buffer_bytes = layer_bytes if self.shards > 1 else 0
        copy_bytes = self.copy_bytes
        root = self.holdings.gathered_in(layer=False) * self.width
        self.add(GATHERED, root + (root if self.shards > 1 else 0))
        self.apply("forward", "", play(model.ends, "embedding"))
        for layer, kind in enumerate(model.order):
            # The previous buffer, at first the root's, lives until this layer's buffer is copied out.
            if layer == 0:
                prefetched, previous = buffer_bytes, 0
            else:
                prefetched, previous = buffer_bytes * min(ahead, layers - layer), buffer_bytes
            self.point("forward", f"layer {layer}, gathered", {GATHERED: previous + prefetched + layer_bytes})
            if layer == 0 and self.shards > 1:
                self.add(GATHERED, -root)
            during = buffer_bytes * (1 + min(ahead, layers - 1 - layer))
            if layer == 0 or layer + ahead < layers:
                self.point("forward", f"layer {layer}, prefetch", {GATHERED: during + layer_bytes + copy_bytes})
            self.add(GATHERED, during + layer_bytes)
            self.apply("forward", f"layer {layer}", play(model.layers[kind], "forward"))
            self.add(GATHERED, -during - (layer_bytes if parallel.reshard_after_forward else 0))
        self.add(GATHERED, buffer_bytes)
        self.apply("forward", "", play(model.ends, "loss"))
        self.leave_autocast()
        self.add(GATHERED, -buffer_bytes)

    @property
    def copy_bytes(self) -> int:
        """Bytes of a copy of a layer's shards before their gather: cast by mixed precision, or moved to the device."""
        copies = self.shards > 1 and (self.gathered_width != self.width or not self.shards_on_device)
        return self.holdings.gathered_in(layer=True) // self.shards * self.gathered_width if copies else 0

    @property
    def gathered_in_evaluation(self) -> int:
        """Bytes of a layer (all layers without resharding), of its buffer and the prefetched ones, and of the root."""
        layer = self.holdings.gathered_in(layer=True) * self.gathered_width
        ahead = min(self.config.parallel.prefetch_blocks, len(self.model.order) - 1)
        buffers = layer * (1 + ahead) if self.shards > 1 else 0
        kept = 1 if self.config.parallel.reshard_after_forward else len(self.model.order)
        return layer * kept + buffers + self.holdings.gathered_in(layer=False) * self.width

    def backward(self) -> None:
        parallel, model = self.config.parallel, self.model
        layers, ahead = len(model.order), parallel.prefetch_blocks
        layer_bytes = self.holdings.gathered_in(layer=True) * self.gathered_width
        buffer_bytes = layer_bytes if self.shards > 1 else 0
        copy_bytes = self.copy_bytes
        end_gradients, layer_gradients = self.gradients_of_ends(), self.unsharded(self.gathered_width)
        remainder_gradients = end_gradients if self.remainder_is_whole else None
        # The root prefetches the last layer if it has sharded parameters.
        prefetched_early = buffer_bytes if parallel.reshard_after_forward and not self.remainder_is_whole else 0
        self.add(GATHERED, prefetched_early)
        played = play(model.ends, "loss backward", end_gradients)
        self.apply("backward", "", played)
        self.add(GATHERED, -prefetched_early)
        for layer, kind in reversed(list(enumerate(model.order))):
            prefetched = 0
            if parallel.reshard_after_forward:
                previous = buffer_bytes * (1 if layer == layers - 1 else min(ahead, layer + 1))
                self.point("backward", f"layer {layer}, gathered", {GATHERED: previous + layer_bytes})
                self.add(GATHERED, layer_bytes)
                prefetched = buffer_bytes * min(ahead, layer)
                if layer == layers - 1 or layer >= ahead:
                    self.point("backward", f"layer {layer}, prefetch", {GATHERED: prefetched + copy_bytes})
            self.add(GATHERED, prefetched)
            recording, in_flight = model.layers[kind], played.in_flight
            played = play(recording, "backward", layer_gradients, in_flight, remainder_gradients, last=layer == 0)
            self.apply("backward", f"layer {layer}", played)
            self.add(GATHERED, -layer_bytes)
            self._reduce(f"layer {layer}", in_layer=True)
            self.add(GATHERED, -prefetched)
        played = play(model.ends, "embedding backward", end_gradients, played.in_flight)
        self.apply("backward", "", played)
        if not self.remainder_is_whole:
            self.add(GATHERED, -self.holdings.gathered_in(layer=False) * self.width)
            self._reduce("root", in_layer=False)
        self.clear(REDUCED)
        self.apply("backward", "last updates", use_in_flight(end_gradients, played.in_flight))
        if self.remainder_is_whole and self.ranks > 1 and self.config.optim.update == "whole":
            message = self.width * self.holdings.whole_values
            self.point("backward", "all-reduce of the dense remainder", {"buffers.messages": message})

    def gradients_of_ends(self) -> Gradients:
        """Returns how gradients of embedding, last norm and head are handled."""
        if self.remainder_is_whole:
            return self.gradients
        return self.unsharded(self.width)

    def unsharded(self, width: int) -> Gradients:
        """Returns how gradients are handled before they are sharded: kept, or added to earlier ones of their type."""
        accumulates = self.passes > 1 and self.accumulates_whole
        return Gradients("add" if accumulates and width == self.width else "keep", width)

    @cached_property
    def shard_steps(self) -> dict[bool, int]:
        """Transient bytes of the optimizer step of a shard: the largest in a layer (True), and in the root (False)."""
        steps = {False: 0, True: 0}
        for item in self.holdings.sharded:
            steps[item.in_layer] = max(steps[item.in_layer], self.step_bytes(item))
        return steps

    def _reduce(self, where: str, *, in_layer: bool) -> None:
        """Plays the reduce-scatter of a layer's or the root's gradients, and a per-layer update of the shards."""
        values = self.holdings.gathered_in(layer=in_layer)
        gradient_width = self.gathered_width if in_layer else self.width
        whole_values = self.holdings.sharded_in(layer=in_layer)
        local = self.passes > 1 and self.accumulates_whole
        self.clear(REDUCED)  # the previous layer's
        kept = whole_values * gradient_width if self.unsharded(gradient_width).use == "keep" else 0
        if local:  # they are added to the accumulated ones, which are of another type
            self.add("gradients", -kept)
            kept = whole_values * self.width
        self.point("backward", f"{where}, gradients copied for their reduce-scatter", {REDUCED: values * self.width})
        self.add("gradients", -kept)
        self.add(REDUCED, values * self.width)
        part = values * self.width // self.shards
        # A loop variable of torch's foreach_reduce keeps the last gradient until the end.
        last = self.last_sharded(layer=in_layer) * (self.width if local else gradient_width) if self.shards > 1 else 0
        if self.shards == 1:
            self.point("backward", f"{where}, gradients copied", {REDUCED: part, "gradients": part})
        per_layer, accumulates_sharded = self.config.optim.update == "per_layer", self.passes > 1 and not local
        more = {"gradients": part + last, "temporaries.update": self.shard_steps[in_layer] if per_layer else 0}
        self.point("backward", f"{where}, {'update of its shards' if per_layer else 'gradients reduced'}", more)
        if per_layer:
            self.add("gradients", -part if accumulates_sharded else 0)
        elif not accumulates_sharded and self.shards_on_device:
            self.add("gradients", part)

    def last_sharded(self, *, layer: bool) -> int:
        """Returns the number of values of the last sharded parameter of a layer, or outside all layers."""
        return next((i.parameter.values for i in reversed(self.holdings.sharded) if i.in_layer is layer), 0)
