"""The memory of an update under DeepSpeed ZeRO (no torch), after stage_1_and_2.py, stage3.py and
partition_parameters.py of deepspeed 0.19. It cannot be replayed on fake tensors, so it is compared with live bytes of
real runs.

Gradients are copied into a bucket, and a full bucket is copied again to be sent. In stage 3 the bucket is always
allocated; in stage 2, from the first gradient to the end of a backward pass; in stage 1, to the end of the last one of
the update.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cached_property

from sltrain_dist.memory.holdings import Holdings, holdings_of
from sltrain_dist.memory.ledger import Gradients, play
from sltrain_dist.memory.schedules.ddp import Timeline
from sltrain_dist.optim.state_layout import STATE_NAMES, is_orthogonalized
from sltrain_dist.parallel.placement import (
    ZERO_BUCKET,
    Named,
    optimizer_groups,
    sharded_and_whole,
    zero3_values,
    zero12_gradients,
    zero12_partition,
)

FLAT, BUCKET, GATHERED, MESSAGES = "buffers.partition", "buffers.bucket", "buffers.gathered", "buffers.messages"
_SUB_GROUP = 1_000_000_000
"""Number of values that stage 3 updates at a time (DeepSpeed's default)."""


class ZeroTimeline(Timeline):
    """The live bytes over one update of the engine `zero`, on the rank that keeps the most gradients."""

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return self.config.parallel.zero_stage

    @property
    def offload(self) -> bool:
        """Whether optimizer states and the optimizer step are offloaded to the host."""
        return self.config.parallel.cpu_offload

    @cached_property
    def holdings(self) -> Holdings:
        return holdings_of(self.model, self.config.parallel.shard, 1)

    @cached_property
    def sharded(self) -> Named:
        """Names and shapes of the parameters that DeepSpeed shards."""
        return sharded_and_whole(self.config)[0]

    @property
    def sharded_values(self) -> int:
        """Number of values in the parameters that DeepSpeed shards."""
        return self.holdings.sharded_values

    @cached_property
    def groups(self) -> list[tuple[tuple[int, ...], ...]]:
        """Shapes of the sharded parameters in each parameter group of the optimizer."""
        return optimizer_groups(self.sharded, self.config.optim)

    @cached_property
    def part(self) -> int:
        """Number of values in a rank's partitions of all groups."""
        if self.stage == 3:
            return zero3_values(self.sharded, self.ranks, offload=False)[2]
        return sum(zero12_partition(group, self.ranks)[1] for group in self.groups)

    @cached_property
    def kept_gradients(self) -> int:
        """Number of values of reduced gradients that a rank keeps."""
        if self.stage == 3 or self.offload:
            return self.part
        by_rank = [zero12_gradients(group, self.ranks) for group in self.groups]
        return max(map(sum, zip(*by_rank, strict=True)))

    @property
    def state_values(self) -> int:
        """Number of values of the optimizer states in a rank's partitions: of matrices without their padding."""
        optim = self.config.optim
        matrices = tuple((name, shape) for name, shape in self.sharded if is_orthogonalized(name, optim))
        values = sum(math.prod(shape) for _, shape in matrices)
        if self.stage == 3:
            of_matrices = padded = zero3_values(matrices, self.ranks, offload=False)[2]
        else:
            padded = sum(zero12_partition(group, self.ranks)[1] for group in optimizer_groups(matrices, optim))
            of_matrices = min(padded, values)
        return len(STATE_NAMES[optim.name]) * (self.part - padded) + of_matrices

    @property
    def bucket(self) -> int:
        """Number of values in the bucket."""
        settings = self.config.parallel.deepspeed.get("zero_optimization", {})
        return int(settings.get("reduce_bucket_size", min(ZERO_BUCKET, self.sharded_values)))

    @property
    def message(self) -> int:
        """Bytes of the copy of a full bucket, or of a larger gradient, that is sent; twice with Gloo in stage 3."""
        largest = self.holdings.largest_sharded
        copies = 2 if self.stage == 3 and self.device == "cpu" else 1
        return copies * self.width * max(min(self.bucket, self.sharded_values), largest if largest > self.bucket else 0)

    # Memory between updates

    def allocate_parameters(self) -> None:
        super().allocate_parameters()
        if self.stage == 3:
            for item in self.holdings.sharded:
                part = -(-item.parameter.values // self.ranks)
                self.add(item.parameter.component, item.count * (part - item.parameter.values) * self.width)
        else:
            padding = sum(self.ranks * zero12_partition(g, self.ranks)[1] for g in self.groups) - self.sharded_values
            self.add(FLAT, padding * self.width)

    def init(self) -> None:
        """Plays the construction of DeepSpeed's engine with all its buffers; initial values are set afterwards.

        In stages 1 and 2 the parameters are in the flat buffer from the beginning.
        """
        part = self.part * self.width
        if self.stage < 3:
            largest = self.holdings.largest_sharded * self.width
            copies = {FLAT: max(part, largest)} if self.offload else {FLAT: part, "gradients": part}
            self.point("init", "flat weights, and a rank's partition of them", copies)
            return
        largest = max(self.layer_values)
        whole = (largest - largest // self.ranks) * self.width
        self.point("init", "the largest layer, before it is partitioned", {GATHERED: whole})
        tables = sum(item.count * item.parameter.values for item in self.holdings.sharded if item.kind is None)
        self.point("init", "embedding and head, before they are partitioned", {GATHERED: tables * self.width})
        copies = {BUCKET: self.bucket * self.width}
        self.point("init", "partitions", copies if self.offload else {**copies, FLAT: part, "gradients": part})

    def allocate_states_and_gradients(self) -> None:
        optim, width = self.config.optim, self.width
        self.add("states", self.holdings.states(optim, width, with_sharded=False)[0])
        if self.passes > 1:
            self.add("gradients", self.holdings.whole_values * width)
        if self.offload:
            self.add(FLAT, self.holdings.largest_sharded * width if self.stage < 3 else 0)
        else:
            self.add(FLAT, self.part * width)  # the flat copy that the optimizer steps
            self.add("states", self.state_values * width)
        if self.stage == 1 and self.passes > 1:
            self.add(BUCKET, self.bucket * width)  # until the end of the update's last micro-batch
        if self.stage == 3:
            self.add(BUCKET, self.bucket * width)
            self.add("gradients", 0 if self.offload else self.part * width)
        elif self.passes > 1:
            accumulated = self.sharded_values if self.stage == 1 else 0 if self.offload else self.kept_gradients
            self.add("gradients", accumulated * width)

    # An update

    @cached_property
    def layer_values(self) -> list[int]:
        """Number of values that stage 3 gathers for each decoder layer, with padding."""
        sums: dict[int | None, int] = defaultdict(int)
        for item in self.holdings.sharded:
            sums[item.kind] += self.ranks * -(-item.parameter.values // self.ranks)
        return [sums[kind] for kind in self.model.kinds]

    @cached_property
    def layer_bytes(self) -> list[int]:
        """Bytes that stage 3 gathers for each decoder layer; 0 in other stages."""
        return [values * self.width if self.stage == 3 else 0 for values in self.layer_values]

    def prefetched(self, next_bytes: list[int]) -> int:
        """Returns the bytes that are gathered ahead, of the next layers: `prefetch_blocks` layers of average size."""
        average = -(-sum(self.layer_bytes) // len(self.layer_bytes))
        return min(sum(next_bytes), self.config.parallel.prefetch_blocks * average)

    def forward(self) -> None:
        if self.stage < 3:
            super().forward()
            return
        table, layer_bytes = self._table(), self.layer_bytes
        self.add(GATHERED, 2 * table)  # the embedding's, and the head's, which is prefetched
        self.apply("forward", "", play(self.model.ends, "embedding"))
        for layer, index in enumerate(self.model.order):
            prefetched = self.prefetched(layer_bytes[layer + 1 :])
            self.point("forward", f"layer {layer}, gathered", {GATHERED: 2 * layer_bytes[layer] + prefetched})
            self.add(GATHERED, layer_bytes[layer] + prefetched)
            self.apply("forward", f"layer {layer}", play(self.model.layers[index], "forward"))
            self.add(GATHERED, -layer_bytes[layer] - prefetched)
        # The last layer stays gathered for its backward pass, and the layer before it is gathered meanwhile.
        self.add(GATHERED, layer_bytes[-1] + self.prefetched(layer_bytes[:-1]) - table)
        self.apply("forward", "", play(self.model.ends, "loss"))
        self.leave_autocast()

    @property
    def gathered_in_evaluation(self) -> int:
        """In stage 3, bytes of a layer, the prefetched layers, and the embedding's or the head's weight; else 0."""
        largest = max(
            size + self.prefetched(self.layer_bytes[layer + 1 :]) for layer, size in enumerate(self.layer_bytes)
        )
        return largest + self._table() if self.stage == 3 else 0

    def _table(self) -> int:
        """Returns the bytes of the embedding's or the head's weight if it is gathered, else 0."""
        return self.model.ends.parameters[0].values * self.width if self.config.parallel.shard == "all" else 0

    def backward(self) -> None:
        end_gradients, model = self.gradients_of_ends(), self.model
        self.apply("backward", "", play(model.ends, "loss backward", end_gradients))
        if self.stage < 3:
            self.clear(BUCKET)
            self.add(BUCKET, self.bucket * self.width)
        layers, layer_bytes = len(model.order), self.layer_bytes
        self.clear(GATHERED)
        full = self.sharded_values > self.bucket
        layer_gradients = self.gradients_of_layer(full=full)
        remainder_gradients = None if self.config.parallel.shard == "all" else end_gradients
        if full and self.stage == 2:
            self.add("gradients", 0 if self.offload else self.kept_gradients * self.width)
        for layer, index in reversed(list(enumerate(model.order))):
            prefetched = self.prefetched(layer_bytes[:layer])
            if layer < layers - 1 and self.stage == 3:
                self.point("backward", f"layer {layer}, gathered", {GATHERED: 2 * layer_bytes[layer] + prefetched})
            self.add(GATHERED, layer_bytes[layer] + prefetched)
            played = play(model.layers[index], "backward", layer_gradients, (), remainder_gradients, last=layer == 0)
            self.apply("backward", f"layer {layer}", played)
            if self.stage == 3:
                if full:
                    self.point("backward", f"layer {layer}, gradients sent", {MESSAGES: self.message})
                self.add("gradients", -self.width * self.holdings.sharded_in(model.kinds[layer]))
            self.add(GATHERED, -layer_bytes[layer] - prefetched)
        table_gradients = Gradients("keep", self.width) if self.stage == 3 and self._table() else end_gradients
        self.apply("backward", "", play(model.ends, "embedding backward", table_gradients))
        self._reduce(full=full)
        message = self.width * self.holdings.whole_values
        if message and self.ranks > 1:
            self.point("backward", "all-reduce of the dense remainder", {MESSAGES: message})

    def gradients_of_ends(self) -> Gradients:
        """Returns how gradients of embedding, last norm and head are handled."""
        if self.config.parallel.shard == "all":
            copied = self.stage > 1 or self.passes > 1
            return Gradients("add" if copied else "keep", self.width)
        return Gradients("add" if self.passes > 1 else "keep", self.width)

    def gradients_of_layer(self, *, full: bool) -> Gradients:
        """Returns how a layer's gradients are handled: kept unsharded (stage 1), copied into the bucket as they arrive
        (stage 2), or after the layer's backward pass (stage 3).

        Args:
            full: Whether the bucket fills up before the end of the backward pass.
        """
        if self.stage == 1:
            return Gradients("add" if self.passes > 1 else "keep", self.width)
        if self.stage == 2:
            return Gradients("add", self.width, message_bytes=self.message if full else 0)
        return Gradients("keep", self.width)

    def _reduce(self, *, full: bool) -> None:
        """Plays the end of a backward pass: the rest of the bucket is sent, and the rank keeps its part."""
        kept = self.kept_gradients * self.width
        if self.stage == 1:
            # Gradients are copied into the bucket one by one, and freed when the bucket is sent.
            self.add("gradients", -self.width * min(self.sharded_values, self.bucket))
        self.point("backward", "gradients sent", {MESSAGES: self.message})
        if not self.offload and (self.stage == 1 or (self.stage == 2 and not full)):
            self.add("gradients", kept)
        if self.stage == 3:
            self.add("gradients", -self._table())  # the embedding's gradient is freed last
        if self.stage == 1 and self.sharded_values > self.bucket:
            self.add("gradients", -self.width * (self.sharded_values - self.bucket))
        if self.stage < 3:
            self.clear(BUCKET)
            if self.passes > 1 and self.stage == 2 and not self.offload:
                self.add("gradients", -kept)  # they were added to those of earlier micro-batches

    def update(self) -> None:
        self.add("batch", -self.batch_bytes(self.tokens))
        copied = 0 if self.offload else self.width * max(self._partitions())
        self.point("update", "gradients of a partition in one piece", {"temporaries.update": copied})
        if self.config.optim.factors != "adam":
            self.orthogonalize(beside=copied)
        self.clear("gradients")
        self.add("gradients", self.part * self.width if self.stage == 3 and not self.offload else 0)

    def _partitions(self) -> list[int]:
        if self.stage == 3:
            return [min(self.part, _SUB_GROUP)]
        return [zero12_partition(group, self.ranks)[1] for group in self.groups]

    def free_gradients(self) -> None:
        """Does nothing: the update has freed those that DeepSpeed frees."""

    def save(self) -> None:
        self.point("save", "checkpoint")
