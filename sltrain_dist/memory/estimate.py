"""The estimate of a run's memory: bytes by component at moments of an update, on the rank that needs the most.

Recordings of the training code are played on the engine's schedule, with the optimizer states allocated. With gradient
accumulation, the last micro-batch is played. Torch is imported only if a recording is missing. See docs/planner.md.
"""

from __future__ import annotations

from sltrain_dist.config.rules import check_trainable, micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.device_overhead import communicators, reserved_bytes
from sltrain_dist.memory.recorded_model import recorded_model
from sltrain_dist.memory.recording_store import (
    Request,
    ends_request,
    evaluation_requests,
    layer_requests,
    restart_requests,
)
from sltrain_dist.memory.result import Estimate
from sltrain_dist.memory.schedules.ddp import Timeline
from sltrain_dist.memory.schedules.fsdp import FsdpTimeline
from sltrain_dist.memory.schedules.zero import ZeroTimeline
from sltrain_dist.models.count import count_parameters
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.parallel.communication import update_traffic

_RELATIVE_ERROR = {"ddp": 0.05, "fsdp": 0.05, "zero": 0.1}
"""Largest expected error of the peak against replays, or, for zero, which cannot be replayed, against live bytes."""


def estimate(config: Config, *, ranks: int = 1, device: DeviceType = "cuda") -> Estimate:
    """Estimates the memory of a run.

    Args:
        config: The run.
        ranks: World size.
        device: Device whose operators the run uses.

    Raises:
        ConfigError: The configuration cannot be trained, or not on this number of ranks.
    """
    check_trainable(config)
    passes = micro_batches_per_update(config, ranks)
    model = recorded_model(config, device)
    schedule = {"ddp": Timeline, "fsdp": FsdpTimeline, "zero": ZeroTimeline}[config.parallel.engine]
    points = schedule(config, model, ranks, passes, device).points()
    peak = max(point.total for point in points)
    parameters = sum(len(model.layer_parameters[kind]) for kind in model.kinds)
    tensors = 3 * parameters  # a parameter, its gradient or states, activations
    flops = model.flops * (2 if config.optim.passes_twice else 1)
    return Estimate(
        timeline=tuple(points),
        reserved_bytes=reserved_bytes(peak, tensors, ranks, communicators(config.parallel)),
        parameters=count_parameters(config.model, config.reparam).total,
        flops_per_token=flops // (config.train.micro_batch * config.data.seq_len),
        comm_bytes_per_update=round(update_traffic(config, ranks).total),
        relative_error=_RELATIVE_ERROR[config.parallel.engine],
        restart_flops=sum(n * request.get().flops for request, n in restart_requests(config, device).items()),
    )


def recordings_of(config: Config, device: DeviceType = "cuda") -> list[Request]:
    """Returns requests for the slowest recordings that the estimate of a run needs."""
    layers, evaluations = layer_requests(config, device)[0], evaluation_requests(config, device)[0]
    return [*layers, ends_request(config, device), *evaluations]
