"""What the planner says of a run (no torch): bytes by component at points of a training step, per rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

Phase = Literal["init", "forward", "backward", "update", "save"]
"""Stretches of a run, in their order."""

Group = Literal[
    "factors",  # B and A
    "sparse_values",  # V
    "index",  # of the supports: positions, or permutations
    "dense",  # embedding, head, norms; all weights with method full
    "gradients",
    "states",  # of the optimizer
    "master_weights",
    "activations",  # kept for the backward pass
    "temporaries",  # that live inside one operator, layer or step of the optimizer
    "buffers",  # of the engine: gathered blocks, buckets, messages
    "batch",  # token ids and labels
]
"""Kinds of bytes. A component is one of them, or one with a detail after a dot: "activations.attention"."""


@dataclass(frozen=True)
class Point:
    """The bytes that live at one moment.

    Attributes:
        phase: Part of the run.
        where: The moment in words, such as "block 3, mlp.down_proj".
        components: Bytes by component; the group of each is what stands before its first dot.
    """

    phase: Phase
    where: str
    components: Mapping[str, int]

    @cached_property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.components.values())

    def groups(self) -> dict[str, int]:
        """Bytes by group, those of none left out, in the order of :data:`Group`."""
        sums = dict.fromkeys(get_args(Group), 0)
        for component, size in self.components.items():
            sums[component.partition(".")[0]] += size
        return {group: size for group, size in sums.items() if size}


@dataclass(frozen=True)
class Estimate:
    """What a run takes on the rank that needs most.

    Attributes:
        timeline: Moments of a run in their order, any of which may be the peak.
        reserved_bytes: What the device takes beside allocated tensors: context, workspaces, allocator slack.
        parameters: Of the whole model.
        flops_per_token: Floating-point operations that are really done, forward and backward, recomputation included.
        comm_bytes_per_update: Sent by each rank.
        relative_error: Largest error of `peak_bytes` that is to be expected, as a share of it.
        method: How it was found: "recording" (of the training code, played), "replay" (of a whole update on fake
            tensors), or "reference emulation" (of other code).
    """

    timeline: tuple[Point, ...]
    reserved_bytes: int
    parameters: int
    flops_per_token: int
    comm_bytes_per_update: int
    relative_error: float
    method: Literal["recording", "replay", "reference emulation"] = "recording"

    @cached_property
    def peak(self) -> Point:
        """The moment that binds; the first of several."""
        return max(self.timeline, key=lambda point: point.total)

    @property
    def peak_bytes(self) -> int:
        """Largest number of allocated bytes."""
        return self.peak.total

    @property
    def device_bytes(self) -> int:
        """What a device must have."""
        return self.peak_bytes + self.reserved_bytes

    def phases(self) -> dict[Phase, Point]:
        """The largest moment of each phase."""
        largest: dict[Phase, Point] = {}
        for point in self.timeline:
            if point.phase not in largest or point.total > largest[point.phase].total:
                largest[point.phase] = point
        return largest

    def peak_of(self, phase: Phase) -> Point:
        """The largest moment of a phase."""
        return self.phases()[phase]
