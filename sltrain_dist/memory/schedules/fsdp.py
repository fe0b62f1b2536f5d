"""The memory of an update under FSDP2, after torch's _fsdp_param_group.py and _fsdp_collectives.py (no torch).

A layer's shards are gathered into one buffer and copied out to its parameters; on one rank they are only copied. In
the forward pass the buffer lives until the next layer's buffer is copied out. After a layer's backward pass its
gradients are copied into one buffer for the reduce-scatter, which lives until the next layer's reduce-scatter.
"""

from __future__ import annotations

from collections import defaultdict
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
        parallel, model, buffers = self.config.parallel, self.model, self.buffers
        ahead = parallel.prefetch_blocks
        root = self.holdings.gathered_in(None) * self.width
        self.add(GATHERED, root + (root if self.shards > 1 else 0))
        if copying := self.copying_beyond[None]:
            self.point("forward", "root, gathered", {GATHERED: copying})
        self.apply("forward", "", play(model.ends, "embedding"))
        for layer, index in enumerate(model.order):
            layer_bytes = self.layer_bytes[layer]
            # The previous buffer, at first the root's, lives until this layer's buffer is copied out.
            if layer == 0:
                prefetched, previous = buffers[0], 0
            else:
                prefetched, previous = sum(buffers[layer : layer + ahead]), buffers[layer - 1]
            gathered = layer_bytes + self.copying_beyond[model.kinds[layer]]
            self.point("forward", f"layer {layer}, gathered", {GATHERED: previous + prefetched + gathered})
            if layer == 0 and self.shards > 1:
                self.add(GATHERED, -root)
            during = sum(buffers[layer : layer + ahead + 1])
            # The first layer prefetches all layers that are ahead of it, and any other layer one more.
            copies = self.copies[layer + (1 if layer == 0 else ahead) : layer + ahead + 1]
            if layer == 0 or copies:
                copied = max(copies, default=self.copies[0])
                self.point("forward", f"layer {layer}, prefetch", {GATHERED: during + layer_bytes + copied})
            self.add(GATHERED, during + layer_bytes)
            self.apply("forward", f"layer {layer}", play(model.layers[index], "forward"))
            self.add(GATHERED, -during - (layer_bytes if parallel.reshard_after_forward else 0))
        self.add(GATHERED, buffers[-1])
        self.apply("forward", "", play(model.ends, "loss"))
        self.leave_autocast()
        self.add(GATHERED, -buffers[-1])

    @cached_property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer's gathered parameters."""
        return [self.holdings.gathered_in(kind) * self.gathered_width for kind in self.model.kinds]

    @cached_property
    def buffers(self) -> list[int]:
        """Bytes of the buffer that each layer is gathered into; on one rank there are none."""
        return [size if self.shards > 1 else 0 for size in self.layer_bytes]

    @cached_property
    def copies(self) -> list[int]:
        """Bytes of a copy of each layer's shards before they are gathered: cast, or moved to the device."""
        copies = self.shards > 1 and (self.gathered_width != self.width or not self.shards_on_device)
        return [size // self.shards if copies else 0 for size in self.layer_bytes]

    @cached_property
    def copying_beyond(self) -> dict[int | None, int]:
        """Peak bytes beyond the gathered parameters while one rank copies them, by kind of layer; None for the root.

        One parameter at a time is moved to the device, cast, and copied out. Its cast is freed after the next one is
        made (_fsdp_param_group.py: wait_for_unshard).
        """
        beyond: dict[int | None, int] = defaultdict(int)
        for kind in (None, *range(len(self.model.layer_parameters))):
            width = self.width if kind is None else self.gathered_width
            casts, moves = width != self.width, not self.shards_on_device
            if self.shards > 1 or not (casts or moves):
                continue
            copied = previous = peak = 0
            for values in (item.values for item in self.holdings.sharded if item.kind == kind):
                size, moved = values * width, values * self.width if casts and moves else 0
                peak = max(peak, copied + previous + moved + size, copied + 2 * size)
                copied, previous = copied + size, size
            beyond[kind] = peak - copied
        return beyond

    @property
    def gathered_in_evaluation(self) -> int:
        """Bytes of a layer (all layers without resharding), of its buffer and the prefetched ones, and of the root."""
        ahead = self.config.parallel.prefetch_blocks
        reshards = self.config.parallel.reshard_after_forward
        largest = max(
            (size if reshards else 0) + sum(self.buffers[layer : layer + 1 + ahead])
            for layer, size in enumerate(self.layer_bytes)
        )
        kept = 0 if reshards else sum(self.layer_bytes)
        return kept + largest + self.holdings.gathered_in(None) * self.width

    def backward(self) -> None:
        parallel, model, buffers = self.config.parallel, self.model, self.buffers
        layers, ahead = len(model.order), parallel.prefetch_blocks
        end_gradients, layer_gradients = self.gradients_of_ends(), self.unsharded(self.gathered_width)
        remainder_gradients = end_gradients if self.remainder_is_whole else None
        # The root prefetches the last layer if it has sharded parameters.
        prefetched_early = buffers[-1] if parallel.reshard_after_forward and not self.remainder_is_whole else 0
        self.add(GATHERED, prefetched_early)
        played = play(model.ends, "loss backward", end_gradients)
        self.apply("backward", "", played)
        self.add(GATHERED, -prefetched_early)
        for layer, index in reversed(list(enumerate(model.order))):
            layer_bytes, prefetched = self.layer_bytes[layer], 0
            if parallel.reshard_after_forward:
                first = layer if layer == layers - 1 else max(0, layer - ahead + 1)
                previous = sum(buffers[first : layer + 1])
                gathered = layer_bytes + self.copying_beyond[model.kinds[layer]]
                self.point("backward", f"layer {layer}, gathered", {GATHERED: previous + gathered})
                self.add(GATHERED, layer_bytes)
                prefetched = sum(buffers[max(0, layer - ahead) : layer])
                if layer == layers - 1 or layer >= ahead:
                    copies = self.copies[max(0, layer - ahead) : layer if layer == layers - 1 else layer - ahead + 1]
                    copied = max(copies, default=self.copies[0])
                    self.point("backward", f"layer {layer}, prefetch", {GATHERED: prefetched + copied})
            self.add(GATHERED, prefetched)
            recording, in_flight = model.layers[index], played.in_flight
            played = play(recording, "backward", layer_gradients, in_flight, remainder_gradients, last=layer == 0)
            self.apply("backward", f"layer {layer}", played)
            self.add(GATHERED, -layer_bytes)
            self._reduce(f"layer {layer}", model.kinds[layer])
            self.add(GATHERED, -prefetched)
        played = play(model.ends, "embedding backward", end_gradients, played.in_flight)
        self.apply("backward", "", played)
        if not self.remainder_is_whole:
            self.add(GATHERED, -self.holdings.gathered_in(None) * self.width)
            self._reduce("root", None)
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

    def free_matrix_gradients(self) -> None:
        """Does nothing: FSDP2's own parameters refer to the gradients of the shards until all are updated."""

    def unsharded(self, width: int) -> Gradients:
        """Returns how gradients are handled before they are sharded: kept, or added to earlier ones of their type."""
        accumulates = self.passes > 1 and self.accumulates_whole
        return Gradients("add" if accumulates and width == self.width else "keep", width)

    @cached_property
    def shard_steps(self) -> dict[int | None, int]:
        """Largest transient bytes of the optimizer step of a shard, by kind of layer; None for the root."""
        steps: dict[int | None, int] = defaultdict(int)
        for item in self.holdings.sharded:
            steps[item.kind] = max(steps[item.kind], self.step_bytes(item))
        return steps

    def _reduce(self, where: str, kind: int | None) -> None:
        """Plays the reduce-scatter of the gradients of a layer or of the root (None), and a per-layer update."""
        values = self.holdings.gathered_in(kind)
        gradient_width = self.width if kind is None else self.gathered_width
        whole_values = self.holdings.sharded_in(kind)
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
        last = self.last_sharded(kind) * (self.width if local else gradient_width) if self.shards > 1 else 0
        if self.shards == 1:
            self.point("backward", f"{where}, gradients copied", {REDUCED: part, "gradients": part})
        per_layer, accumulates_sharded = self.config.optim.update == "per_layer", self.passes > 1 and not local
        more = {"gradients": part + last, "temporaries.update": self.shard_steps[kind] if per_layer else 0}
        self.point("backward", f"{where}, {'update of its shards' if per_layer else 'gradients reduced'}", more)
        if per_layer:
            self.add("gradients", -part if accumulates_sharded else 0)
        elif not accumulates_sharded and self.shards_on_device:
            self.add("gradients", part)

    def last_sharded(self, kind: int | None) -> int:
        """Returns the number of values of the last sharded parameter of a kind of layer, or outside all layers."""
        return next((item.parameter.values for item in reversed(self.holdings.sharded) if item.kind == kind), 0)
