"""The result of an estimate: bytes by component at points of a training step, on one rank (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

Phase = Literal["init", "forward", "backward", "update", "restart", "save"]
"""Phases of a run, in order. There is a restart only with `reparam.restart_every`."""

Group = Literal[
    "factors",  # B and A
    "sparse_values",  # V
    "index",  # positions or permutations of the supports
    "dense",  # embedding, head and norms; dense linear layers
    "gradients",
    "states",  # optimizer states
    "master_weights",
    "activations",  # kept for the backward pass
    "temporaries",  # live only during one operator, layer or optimizer step
    "buffers",  # of the engine: gathered layers, buckets, messages
    "batch",  # token ids and labels
]
"""Groups of memory components. A component is a group, or a group and a detail: "activations.attention"."""


@dataclass(frozen=True)
class Point:
    """The live bytes at one moment of a run.

    Attributes:
        phase: Phase of the run.
        where: Description of the moment, such as "layer 3, mlp, backward".
        components: Bytes by component; the part of its name before the first dot is the group.
    """

    phase: Phase
    where: str
    components: Mapping[str, int]

    @cached_property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.components.values())

    def groups(self) -> dict[str, int]:
        """Returns bytes by group in the order of :data:`Group`, without empty groups."""
        sums = dict.fromkeys(get_args(Group), 0)
        for component, size in self.components.items():
            sums[component.partition(".")[0]] += size
        return {group: size for group, size in sums.items() if size}


@dataclass(frozen=True)
class Estimate:
    """The estimated memory, computation and communication of a run, on the rank that needs the most memory.

    Attributes:
        timeline: Moments of the run in order, any of which may be the peak.
        reserved_bytes: Device memory beyond allocated tensors: context, workspaces, allocator slack.
        parameters: Number of parameters of the whole model.
        flops_per_token: Floating-point operations actually executed, forward and backward, including recomputation.
        comm_bytes_per_update: Bytes that each rank sends in an update.
        relative_error: Largest expected error of `peak_bytes`, as a share of it.
        restart_flops: Floating-point operations of a restart, of all ranks together; 0 without restarts.
        method: Method of the estimate: "recording" (recordings of the training code are played), "replay" (a whole
            update is run on fake tensors), or "reference emulation" (of the published code).
    """

    timeline: tuple[Point, ...]
    reserved_bytes: int
    parameters: int
    flops_per_token: int
    comm_bytes_per_update: int
    relative_error: float
    method: Literal["recording", "replay", "reference emulation"] = "recording"
    restart_flops: int = 0

    @cached_property
    def peak(self) -> Point:
        """The moment at which most bytes are allocated; the first of several."""
        return max(self.timeline, key=lambda point: point.total)

    @property
    def peak_bytes(self) -> int:
        """Largest number of allocated bytes."""
        return self.peak.total

    @property
    def device_bytes(self) -> int:
        """Memory that the device must have, in bytes."""
        return self.peak_bytes + self.reserved_bytes

    def phases(self) -> dict[Phase, Point]:
        """Returns the largest moment of each phase."""
        largest: dict[Phase, Point] = {}
        for point in self.timeline:
            if point.phase not in largest or point.total > largest[point.phase].total:
                largest[point.phase] = point
        return largest

    def peak_of(self, phase: Phase) -> Point:
        """Returns the largest moment of a phase."""
        return self.phases()[phase]
