"""The memory that a run was predicted to take, and what it takes.

On CUDA the allocator's peak is compared. On the CPU there is no such number: a process' resident size is that of
libraries, data and what the allocator has not given back. There the bytes of live tensors are followed through an
update. The prediction is a GPU's in both cases (memory/estimate.py); what does not depend on the device, weights,
gradients, states and the supports' index, is compared to the byte.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.device_overhead import WORKSPACE_BYTES
from sltrain_dist.memory.result import Estimate
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.tracking.console import format_bytes
from sltrain_dist.tracking.live_bytes import LiveBytes, storage_bytes
from sltrain_dist.tracking.tracker import RunTracker
from sltrain_dist.train.observers.observer import MEASURED_UPDATE, Observer, Update

Predict = Callable[[Config, int], Estimate]
"""Estimates a run on a number of ranks."""

_HELD: dict[str, tuple[str, ...]] = {
    "weights": ("factors", "sparse_values", "dense", "buffers.partition"),
    "gradients": ("gradients",),
    "optimizer states": ("states", "master_weights"),
    "index of the supports": ("index",),
}
"""What engines can say that they hold, and the planner's groups and components of it."""

_TOLERANCE, _SHARE = 1 << 16, 0.005
"""How far these may be off, in bytes and as a share: messages and small buffers are accounted for here or there."""


@dataclass(frozen=True)
class Observed:
    """Of the rank that takes most of each.

    Attributes:
        peak_bytes: On CUDA the allocator's peak since the start, else of live tensors in one update.
        held: Bytes by the keys of :data:`_HELD`: states after the update, the others before it.
    """

    peak_bytes: int
    held: Mapping[str, int]


class MemoryWatch(Observer):
    """Looks at one update, and compares it with a prediction.

    Args:
        config: The run.
        env: This process among all.
        predict: Makes the prediction.

    Attributes:
        predicted: None if the prediction failed, which stops no training; `failure` says why.
        observed: None before the update that is measured.
    """

    def __init__(self, config: Config, env: Environment, predict: Predict) -> None:
        self._config, self._env = config, env
        self.observed: Observed | None = None
        self._held: dict[str, int] = {}
        self._tracker: LiveBytes | None = None
        self._reported = False

        def predicted() -> tuple[Estimate | None, str]:
            try:
                return predict(config, env.world_size), ""
            except Exception as error:  # a planner bug must not stop training
                return None, f"{type(error).__name__}: {error}"

        # On one rank, for all: what must be recorded takes processor time that the others would have to share.
        self.predicted, self.failure = env.on_main(predicted)

    def summary(self) -> list[tuple[str, str]]:
        """Rows of the start-up summary."""
        if self.predicted is None:
            return [("predicted", f"nothing: the planner failed ({self.failure})")]
        peak, groups = self.predicted.peak, self.predicted.peak.groups()
        largest = sorted(groups, key=lambda group: -groups[group])[:4]
        parts = ", ".join(f"{group.replace('_', ' ')} {format_bytes(groups[group])}" for group in largest)
        device = "" if self._env.device.type == "cuda" else " on a GPU"
        return [
            ("predicted peak", f"{format_bytes(peak.total)} of tensors on each rank{device}, in {peak.phase}: {parts}"),
            ("a device needs", f"{format_bytes(self.predicted.device_bytes)} with context and allocator slack"),
        ]

    @contextmanager
    def updating(self, engine: Engine, update: Update) -> Iterator[None]:
        """Looks at what happens in the block, if it is an update to be measured."""
        # From one update earlier: DDP's buckets are seen only when they are written to.
        followed = update.is_measured or update.number == MEASURED_UPDATE - 1
        tracker = self._follow(engine) if followed and self._env.device.type != "cuda" else None
        with nullcontext() if tracker is None else tracker:
            if tracker is not None:
                tracker.begin(update.number)
            yield
        if not update.is_measured:
            return
        peak = torch.cuda.max_memory_allocated() if tracker is None else tracker.intervals[-1].peak
        self._tracker = None
        self._held["optimizer states"] = storage_bytes(engine.tensors()["states"])  # the first update makes them
        held = [float(self._held.get(kind, 0)) for kind in _HELD]
        peak_bytes, *largest = (int(value) for value in self._env.max([float(peak), *held]))
        self.observed = Observed(peak_bytes, dict(zip(_HELD, largest, strict=True)))

    def backward_done(self, engine: Engine, update: Update) -> None:
        """Notes what the engine holds, if it is an update to be measured."""
        if not update.is_measured:
            return
        tensors = engine.tensors()
        buffers = list(engine.module.named_buffers())
        index = [buffer for name, buffer in buffers if ".support." in name]
        others = [buffer for name, buffer in buffers if ".support." not in name]
        self._held = {
            "weights": storage_bytes([*tensors["parameters"], *others]),
            "gradients": storage_bytes(tensors["gradients"]),
            "index of the supports": storage_bytes(index),
        }

    def values(self) -> dict[str, float]:
        """Predicted and observed peak."""
        both = {"predicted_memory_bytes": self.predicted, "observed_memory_bytes": self.observed}
        return {name: found.peak_bytes for name, found in both.items() if found is not None}

    def _follow(self, engine: Engine) -> LiveBytes:
        """A tracker that knows all tensors that are alive."""
        if self._tracker is None:
            self._tracker = LiveBytes()
            # Not subclasses: the memory of a DTensor is another tensor's, and fake ones of a compiler have none.
            self._tracker.add([each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)])
        return self._tracker

    def updated(self, engine: Engine, update: Update, tracker: RunTracker) -> None:
        """Says once what was found: a note, or a warning where it is further from the prediction than stated."""
        if self.observed is None or self._reported:
            return
        self._reported = True
        on_gpu = self._env.device.type == "cuda"
        kind = "allocated" if on_gpu else "of live tensors"
        found = f"{format_bytes(self.observed.peak_bytes)} {kind} at the peak of the fullest rank"
        if self.predicted is None:
            tracker.note(f"memory: {found}")
            return
        interval, compiled = self.predicted.relative_error, self._config.train.compile
        # The allocator counts cuBLAS' workspaces, which are not tensors of the run.
        off = (self.observed.peak_bytes - (WORKSPACE_BYTES if on_gpu else 0)) / self.predicted.peak_bytes - 1
        found += f", {format_bytes(self.predicted.peak_bytes)} predicted"
        stated = "without torch.compile" if compiled else f"stated: within {interval:.0%}"
        found += f" ({off:+.1%} of it; {stated})" if on_gpu else " for a GPU"
        wrong = self._wrong()
        # The eager run is predicted, and the compiler keeps what it sees fit. And the CPU has operators of its own.
        too_far = on_gpu and not compiled and abs(off) > interval
        if wrong or too_far:
            same = "activations, temporaries or buffers, for weights, gradients, states and index are as predicted"
            tracker.warn(f"the memory planner was wrong about this run: {found}; {', '.join(wrong) or same}")
        else:
            tracker.note(f"memory: {found}")

    def _wrong(self) -> list[str]:
        """Which of the exact components are not."""
        assert self.observed is not None and self.predicted is not None
        before = next(point for point in self.predicted.timeline if point.phase == "update")
        sizes = {**before.components, **before.groups()}
        wrong = []
        for kind, groups in _HELD.items():
            expected, found = sum(sizes.get(group, 0) for group in groups), self.observed.held[kind]
            if abs(found - expected) > max(_TOLERANCE, _SHARE * expected):
                wrong.append(f"{kind} take {format_bytes(found)} instead of {format_bytes(expected)}")
        return wrong
