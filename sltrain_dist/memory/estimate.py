"""What a run takes, in closed form (no torch): bytes by component at moments of an update, on the rank that needs most.

An update is gone through as training goes through it (train/step.py, parallel/), with the optimizer's states there and,
where an update has several micro-batches, the last one. Formulas and sources: docs/planner.md.
"""

from __future__ import annotations

from sltrain_dist.config.rules import check_trainable, micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.device import CUDA, Device, reserved_bytes
from sltrain_dist.memory.flops import flops_per_token
from sltrain_dist.memory.result import Estimate
from sltrain_dist.memory.schedules.ddp import Timeline
from sltrain_dist.memory.schedules.fsdp import FsdpTimeline
from sltrain_dist.memory.schedules.zero import ZeroTimeline
from sltrain_dist.memory.sizes import sizes
from sltrain_dist.models.count import count_parameters
from sltrain_dist.parallel.communication import update_traffic

_RELATIVE_ERROR = {"ddp": 0.05, "fsdp": 0.05, "zero": 0.1}
"""Largest error to be expected: against replays, and with zero, which cannot be replayed, against live bytes."""


def estimate(config: Config, *, ranks: int = 1, device: Device = CUDA) -> Estimate:
    """Estimates a run in closed form.

    Args:
        config: The run.
        ranks: World size.
        device: What it runs on.

    Raises:
        ConfigError: The configuration cannot be run, or not on so many ranks.
    """
    check_trainable(config)
    passes = micro_batches_per_update(config, ranks)
    shapes = sizes(config, device)
    follow = {"ddp": Timeline, "fsdp": FsdpTimeline, "zero": ZeroTimeline}[config.parallel.engine]
    points = follow(config, shapes, ranks, passes, device).points()
    peak = max(point.total for point in points)
    tensors = 3 * len(shapes.block_parameters) * len(shapes.order)  # with gradient, or states, and activations
    return Estimate(
        timeline=tuple(points),
        reserved_bytes=reserved_bytes(peak, tensors, ranks),
        parameters=count_parameters(config.model, config.reparam).total,
        flops_per_token=flops_per_token(config, shapes),
        comm_bytes_per_update=round(update_traffic(config, ranks).total),
        relative_error=_RELATIVE_ERROR[config.parallel.engine],
    )
