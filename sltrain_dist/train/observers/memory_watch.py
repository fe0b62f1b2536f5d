"""Comparison of the predicted memory of a run with its measured memory.

On CUDA, the allocator's peak is measured. The CPU has no such number: the resident size of a process includes
libraries, data, and freed memory that the allocator keeps. There the bytes of live tensors are tracked during an
update. The prediction is for a GPU in both cases (memory/estimate.py). Components that do not depend on the device
(weights, gradients, optimizer states and the supports' index) are compared exactly.
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
"""Predicts the memory of a configuration on a number of ranks."""

_EXACT: dict[str, tuple[str, ...]] = {
    "weights": ("factors", "sparse_values", "dense", "buffers.partition"),
    "gradients": ("gradients",),
    "optimizer states": ("states", "master_weights"),
    "index of the supports": ("index",),
}
"""Components whose bytes engines report exactly, with the planner's groups and components that they consist of."""

_TOLERANCE, _SHARE = 1 << 16, 0.005
"""Allowed difference of these components, in bytes or as a fraction: messages and small buffers may be counted
differently."""


@dataclass(frozen=True)
class Observed:
    """Measured memory, each value as the maximum over all ranks.

    Attributes:
        peak_bytes: On CUDA the allocator's peak since the start, otherwise the peak of live tensors in one update.
        component_bytes: Bytes by keys of :data:`_EXACT`: optimizer states after the update, the others before it.
    """

    peak_bytes: int
    component_bytes: Mapping[str, int]


class MemoryWatch(Observer):
    """An observer that measures the memory of one update and compares it with a prediction.

    Args:
        config: The configuration.
        env: The distributed environment.
        predict: Makes the prediction.

    Attributes:
        predicted: The prediction; None if it failed, which does not stop training. `failure` is the reason.
        observed: The measurement; None before the measured update.
    """

    def __init__(self, config: Config, env: Environment, predict: Predict) -> None:
        self._config, self._env = config, env
        self.observed: Observed | None = None
        self._measured_bytes: dict[str, int] = {}
        self._tracker: LiveBytes | None = None
        self._reported = False

        def predicted() -> tuple[Estimate | None, str]:
            try:
                return predict(config, env.world_size), ""
            except Exception as error:  # a planner bug must not stop training
                return None, f"{type(error).__name__}: {error}"

        # On one rank for all of them, because recording takes CPU time and hosts share their cores among ranks.
        self.predicted, self.failure = env.on_main(predicted)

    def summary(self) -> list[tuple[str, str]]:
        """Returns rows of the start-up summary."""
        if self.predicted is None:
            return [("predicted", f"nothing: the planner failed ({self.failure})")]
        peak, groups = self.predicted.peak, self.predicted.peak.groups()
        largest = sorted(groups, key=lambda group: -groups[group])[:4]
        parts = ", ".join(f"{group.replace('_', ' ')} {format_bytes(groups[group])}" for group in largest)
        device = "" if self._env.device.type == "cuda" else " on a GPU"
        return [
            ("predicted peak", f"{format_bytes(peak.total)} of tensors on each rank{device}, in {peak.phase}: {parts}"),
            ("a device needs", f"{format_bytes(self.predicted.device_bytes)} with context and allocator slack"),
            *self._restart(self.predicted),
        ]

    def _restart(self, predicted: Estimate) -> list[tuple[str, str]]:
        """Returns the row on what a restart takes, if the run makes any."""
        if self._config.reparam.restart_every == 0:
            return []
        slots = self._config.train.global_batch * self._config.data.seq_len
        share = predicted.restart_flops / (slots * predicted.flops_per_token)
        size = format_bytes(predicted.restart_bytes)
        return [("a restart", f"{size} for one layer at a time on each rank, {share:.2g} of an update's FLOPs")]

    @contextmanager
    def updating(self, engine: Engine, update: Update) -> Iterator[None]:
        """Measures the peak memory of the update if it is to be measured."""
        # Track from one update earlier, because DDP's buckets are noticed only when they are written to.
        is_tracked = update.is_measured or update.number == MEASURED_UPDATE - 1
        tracker = self._live_bytes(engine) if is_tracked and self._env.device.type != "cuda" else None
        with nullcontext() if tracker is None else tracker:
            if tracker is not None:
                tracker.begin(update.number)
            yield
        if not update.is_measured:
            return
        peak = torch.cuda.max_memory_allocated() if tracker is None else tracker.intervals[-1].peak
        self._tracker = None
        # Measured now, because the first update creates the states.
        self._measured_bytes["optimizer states"] = storage_bytes(engine.tensors()["states"])
        sizes = [float(self._measured_bytes.get(kind, 0)) for kind in _EXACT]
        peak_bytes, *largest = (int(value) for value in self._env.max([float(peak), *sizes]))
        self.observed = Observed(peak_bytes, dict(zip(_EXACT, largest, strict=True)))

    def backward_done(self, engine: Engine, update: Update) -> None:
        """Measures the engine's tensors if the update is to be measured."""
        if not update.is_measured:
            return
        tensors = engine.tensors()
        buffers = list(engine.module.named_buffers())
        index = [buffer for name, buffer in buffers if ".support." in name]
        others = [buffer for name, buffer in buffers if ".support." not in name]
        self._measured_bytes = {
            "weights": storage_bytes([*tensors["parameters"], *others]),
            "gradients": storage_bytes(tensors["gradients"]),
            "index of the supports": storage_bytes(index),
        }

    def values(self) -> dict[str, float]:
        """Returns the predicted and the measured peak."""
        both = {"predicted_memory_bytes": self.predicted, "observed_memory_bytes": self.observed}
        return {name: found.peak_bytes for name, found in both.items() if found is not None}

    def _live_bytes(self, engine: Engine) -> LiveBytes:
        """Returns a tracker that knows all live tensors."""
        if self._tracker is None:
            self._tracker = LiveBytes()
            # Not subclasses: a DTensor's memory belongs to another tensor, and a compiler's fake tensors have none.
            self._tracker.add([each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)])
        return self._tracker

    def updated(self, engine: Engine, update: Update, tracker: RunTracker) -> None:
        """Reports the comparison once; as a warning if the prediction is further off than its stated error."""
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
        # The allocator counts cuBLAS workspaces, which are not tensors of the run.
        off = (self.observed.peak_bytes - (WORKSPACE_BYTES if on_gpu else 0)) / self.predicted.peak_bytes - 1
        found += f", {format_bytes(self.predicted.peak_bytes)} predicted"
        stated = "without torch.compile" if compiled else f"stated: within {interval:.0%}"
        found += f" ({off:+.1%} of it; {stated})" if on_gpu else " for a GPU"
        wrong = self._differences()
        # The prediction is for eager mode on a GPU; torch.compile keeps other tensors, and the CPU has other operators.
        too_far = on_gpu and not compiled and abs(off) > interval
        if wrong or too_far:
            rest = "activations, temporaries or buffers differ; weights, gradients, states and index are as predicted"
            tracker.warn(f"the memory planner was wrong about this run: {found}; {', '.join(wrong) or rest}")
        else:
            tracker.note(f"memory: {found}")

    def _differences(self) -> list[str]:
        """Describes the components whose measured size differs from the prediction."""
        assert self.observed is not None and self.predicted is not None
        before = next(point for point in self.predicted.timeline if point.phase == "update")
        sizes = {**before.components, **before.groups()}
        wrong = []
        for kind, groups in _EXACT.items():
            expected, found = sum(sizes.get(group, 0) for group in groups), self.observed.component_bytes[kind]
            if abs(found - expected) > max(_TOLERANCE, _SHARE * expected):
                wrong.append(f"{kind} take {format_bytes(found)} instead of {format_bytes(expected)}")
        return wrong
