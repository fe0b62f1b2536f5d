"""An update under DeepSpeed ZeRO (no torch), as deepspeed 0.19's stage_1_and_2.py, stage3.py and
partition_parameters.py make it. Fake tensors cannot follow it: it is compared with live bytes of real runs.

Gradients go into a bucket, and a full bucket is copied once more to be sent. In stages 1 and 2 the bucket lives from
the first gradient of a backward pass to its end (in stage 1: of an update's); in stage 3 always.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import prod

from sltrain_dist.memory.holdings import Holdings, holdings
from sltrain_dist.memory.ledger import Gradients, play
from sltrain_dist.memory.schedules.ddp import Timeline
from sltrain_dist.optim.state_layout import STATE_NAMES
from sltrain_dist.parallel.placement import ZERO_BUCKET, Named, dealt, optimizer_groups, zero3_values, zero12_partition

FLAT, BUCKET, GATHERED, MESSAGES = "buffers.partition", "buffers.bucket", "buffers.gathered", "buffers.messages"
_SUB_GROUP = 1_000_000_000
"""Values that stage 3 updates at a time (its default)."""


class ZeroTimeline(Timeline):
    """Goes through an update of the engine `zero`, on the rank that keeps most gradients."""

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return self.config.parallel.zero_stage

    @property
    def offload(self) -> bool:
        """Whether the optimizer is in the host's memory."""
        return self.config.parallel.cpu_offload

    @cached_property
    def held(self) -> Holdings:
        return holdings(self.model, self.config.parallel.shard, 1)

    @cached_property
    def sharded(self) -> Named:
        """(name, shape) of what DeepSpeed is given."""
        return dealt(self.config)[0]

    @property
    def sharded_values(self) -> int:
        """Values in these."""
        return self.held.dealt_values

    @cached_property
    def groups(self) -> list[tuple[tuple[int, ...], ...]]:
        """Shapes by the optimizer's group."""
        return optimizer_groups(self.sharded, self.config.optim)

    @cached_property
    def part(self) -> int:
        """Values in a rank's partition, of all groups."""
        if self.stage == 3:
            return zero3_values(self.sharded, self.ranks, offload=False)[2]
        return sum(zero12_partition(group, self.ranks)[1] for group in self.groups)

    @cached_property
    def kept_gradients(self) -> int:
        """Values of the gradients that a rank keeps when they have been reduced."""
        if self.stage == 3 or self.offload:
            return self.part
        by_rank = [_kept_values(group, self.ranks) for group in self.groups]
        return max(map(sum, zip(*by_rank, strict=True)))

    @property
    def bucket(self) -> int:
        """Values in the bucket."""
        settings = self.config.parallel.deepspeed.get("zero_optimization", {})
        return int(settings.get("reduce_bucket_size", min(ZERO_BUCKET, self.sharded_values)))

    @property
    def message(self) -> int:
        """Bytes of the copy in which a full bucket is sent; a larger gradient goes by itself. Gloo makes another."""
        largest = self.held.largest_dealt
        copies = 2 if self.stage == 3 and self.device == "cpu" else 1
        return copies * self.width * max(min(self.bucket, self.sharded_values), largest if largest > self.bucket else 0)

    # What lives all the time

    def hold_parameters(self) -> None:
        super().hold_parameters()
        if self.stage == 3:
            for item in self.held.dealt:
                part = -(-item.parameter.values // self.ranks)
                self.add(item.parameter.component, item.count * (part - item.parameter.values) * self.width)
        else:
            padding = sum(self.ranks * zero12_partition(g, self.ranks)[1] for g in self.groups) - self.sharded_values
            self.add(FLAT, padding * self.width)

    def init(self) -> None:
        """DeepSpeed's engine is made, and tries its buffers; no value is set before all of them are there.

        In stages 1 and 2 the parameters lie in the flat buffer from the beginning.
        """
        part = self.part * self.width
        if self.stage < 3:
            largest = self.held.largest_dealt * self.width
            copies = {FLAT: max(part, largest)} if self.offload else {FLAT: part, "gradients": part}
            self.point("init", "flat weights, and a rank's partition of them", copies)
            return
        whole = (self.block_values - self.block_values // self.ranks) * self.width
        self.point("init", "the last block, whole before it is partitioned", {GATHERED: whole})
        tables = sum(item.count * item.parameter.values for item in self.held.dealt if not item.in_layer)
        self.point("init", "embedding and head, before they are partitioned", {GATHERED: tables * self.width})
        copies = {BUCKET: self.bucket * self.width}
        self.point("init", "partitions", copies if self.offload else {**copies, FLAT: part, "gradients": part})

    def hold_more(self) -> None:
        optim, width = self.config.optim, self.width
        self.add("states", self.held.states(optim, width, with_dealt=False)[0])
        if self.passes > 1:
            self.add("gradients", self.held.whole_values * width)
        if self.offload:
            self.add(FLAT, self.held.largest_dealt * width if self.stage < 3 else 0)
        else:
            self.add(FLAT, self.part * width)  # what the optimizer steps
            self.add("states", self.part * width * len(STATE_NAMES[optim.name]))
        if self.stage == 1 and self.passes > 1:
            self.add(BUCKET, self.bucket * width)  # until the update's last micro-batch is through
        if self.stage == 3:
            self.add(BUCKET, self.bucket * width)
            self.add("gradients", 0 if self.offload else self.part * width)
        elif self.passes > 1:
            waits = self.sharded_values if self.stage == 1 else 0 if self.offload else self.kept_gradients
            self.add("gradients", waits * width)

    # An update

    @property
    def block_values(self) -> int:
        """Values that are gathered for a block in stage 3, with padding."""
        items = (item.parameter.values for item in self.held.dealt if item.in_layer)
        return self.ranks * sum(-(-values // self.ranks) for values in items)

    def forward(self) -> None:
        if self.stage < 3:
            super().forward()
            return
        ahead, layers = self.config.parallel.prefetch_blocks, len(self.model.order)
        block = self.block_values * self.width
        table = self._table()
        self.add(GATHERED, 2 * table)  # the embedding's, and the head's, which is fetched early
        self.apply("forward", "", play(self.model.ends, "embedding"))
        for layer, kind in enumerate(self.model.order):
            coming = block * min(ahead, layers - 1 - layer)
            self.point("forward", f"layer {layer}, gathered", {GATHERED: 2 * block + coming})
            self.add(GATHERED, block + coming)
            self.apply("forward", f"layer {layer}", play(self.model.layers[kind], "forward"))
            self.add(GATHERED, -block - coming)
        # The last block is used again at once, and the one before it is gathered meanwhile.
        self.add(GATHERED, block + block * min(ahead, layers - 1) - table)
        self.apply("forward", "", play(self.model.ends, "loss"))
        self.leave_autocast()

    @property
    def gathered_in_evaluation(self) -> int:
        """In stage 3 a layer, those that are prefetched, and the embedding's or the head's weight."""
        ahead = min(self.config.parallel.prefetch_blocks, len(self.model.order) - 1)
        return (self.block_values * self.width * (1 + ahead) + self._table()) if self.stage == 3 else 0

    def _table(self) -> int:
        """Bytes of the embedding's, or the head's, weight where it is gathered."""
        return self.model.ends.parameters[0].values * self.width if self.config.parallel.shard == "all" else 0

    def backward(self) -> None:
        ends, model = self.gradients_of_ends(), self.model
        self.apply("backward", "", play(model.ends, "loss backward", ends))
        if self.stage < 3:
            self.clear(BUCKET)
            self.add(BUCKET, self.bucket * self.width)
        ahead, layers = self.config.parallel.prefetch_blocks, len(model.order)
        block = self.block_values * self.width if self.stage == 3 else 0
        self.clear(GATHERED)
        full = self.sharded_values > self.bucket
        of_remainder = None if self.config.parallel.shard == "all" else ends
        if full and self.stage == 2:
            self.add("gradients", 0 if self.offload else self.kept_gradients * self.width)
        for layer, kind in reversed(list(enumerate(model.order))):
            coming = block * min(ahead, layer)
            if layer < layers - 1 and block:
                self.point("backward", f"layer {layer}, gathered", {GATHERED: 2 * block + coming})
            self.add(GATHERED, block + coming)
            played = play(
                model.layers[kind], "backward", self.gradients_of_layer(full=full), (), of_remainder, last=layer == 0
            )
            self.apply("backward", f"layer {layer}", played)
            if self.stage == 3:
                if full:
                    self.point("backward", f"layer {layer}, gradients sent", {MESSAGES: self.message})
                self.add("gradients", -self.width * self.held.dealt_in(layer=True))
            self.add(GATHERED, -block - coming)
        of_table = Gradients("keep", self.width) if self.stage == 3 and self._table() else ends
        self.apply("backward", "", play(model.ends, "embedding backward", of_table))
        self._reduce(full=full)
        message = self.width * self.held.whole_values
        if message and self.ranks > 1:
            self.point("backward", "all-reduce of the dense remainder", {MESSAGES: message})

    def gradients_of_ends(self) -> Gradients:
        """What becomes of gradients of embedding, last norm and head."""
        if self.config.parallel.shard == "all":
            copied = self.stage > 1 or self.passes > 1
            return Gradients("add" if copied else "keep", self.width)
        return Gradients("add" if self.passes > 1 else "keep", self.width)

    def gradients_of_layer(self, *, full: bool) -> Gradients:
        """What becomes of a block's gradients: kept whole (stage 1), copied into the bucket as they come (2), or when
        the block is through (3).

        Args:
            full: Whether the bucket fills up before the end.
        """
        if self.stage == 1:
            return Gradients("add" if self.passes > 1 else "keep", self.width)
        if self.stage == 2:
            return Gradients("add", self.width, message_bytes=self.message if full else 0)
        return Gradients("keep", self.width)

    def _reduce(self, *, full: bool) -> None:
        """The end of a backward pass: what is still in the bucket is sent, and this rank's part kept."""
        kept = self.kept_gradients * self.width
        if self.stage == 1:
            # Gradients move into the bucket one by one; when it is sent, those in it are freed.
            self.add("gradients", -self.width * min(self.sharded_values, self.bucket))
        self.point("backward", "gradients sent", {MESSAGES: self.message})
        if not self.offload and (self.stage == 1 or (self.stage == 2 and not full)):
            self.add("gradients", kept)
        if self.stage == 3:
            self.add("gradients", -self._table())  # the embedding's waits for the end
        if self.stage == 1 and self.sharded_values > self.bucket:
            self.add("gradients", -self.width * (self.sharded_values - self.bucket))
        if self.stage < 3:
            self.clear(BUCKET)
            if self.passes > 1 and self.stage == 2 and not self.offload:
                self.add("gradients", -kept)  # added to those of earlier micro-batches

    def update(self) -> None:
        self.add("batch", -self.batch_bytes(self.tokens))
        copied = 0 if self.offload else self.width * max(self._partitions())
        self.point("update", "gradients of a partition in one piece", {"temporaries.update": copied})
        self.clear("gradients")
        self.add("gradients", self.part * self.width if self.stage == 3 and not self.offload else 0)

    def _partitions(self) -> list[int]:
        if self.stage == 3:
            return [min(self.part, _SUB_GROUP)]
        return [zero12_partition(group, self.ranks)[1] for group in self.groups]

    def save(self) -> None:
        self.point("save", "checkpoint")


@lru_cache(maxsize=256)
def _kept_values(shapes: Sequence[tuple[int, ...]], ranks: int) -> tuple[int, ...]:
    """Values of the gradients that each rank keeps in stages 1 and 2: whole ones, also of parameters that it shares;
    as parallel/placement.py: rank_bytes."""
    total, part = zero12_partition(shapes, ranks)
    kept = [max(0, (rank + 1) * part - max(rank * part, total)) for rank in range(ranks)]
    start = 0
    for shape in shapes:
        size = prod(shape)
        for rank in range(start // part, -(-(start + size) // part)):
            kept[rank] += size
        start += size
    return tuple(kept)
