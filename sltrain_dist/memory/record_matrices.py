"""Recordings of the optimizer of `optim.factors` on fake tensors."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.events import EventLog
from sltrain_dist.memory.record import by_itself, transient_bytes
from sltrain_dist.memory.recording import Recording
from sltrain_dist.numerics.device import DeviceType, emulate
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.factory import make_optimizer
from sltrain_dist.optim.matrix.jobs import WholeMatrices
from sltrain_dist.optim.matrix.optimizer import MatrixOptimizer


def record_matrix_job(config: Config, dtype: str, parts: tuple[TensorRange, ...], device: DeviceType) -> Recording:
    """Records the three parts of a job of the optimizer of `optim.factors`.

    Args:
        config: Configuration with the optimizer's settings.
        dtype: Type of the parameters, by its name in torch.
        parts: The ranges that this rank holds of the job's parameters: of a matrix, or with spectron of B and A.
        device: Device whose operators are recorded.
    """
    with by_itself(), FakeTensorMode(), emulate(device):
        kind = getattr(torch, dtype)
        named = [
            (part.name, nn.Parameter(torch.empty((part.count // part.row, part.row), dtype=kind))) for part in parts
        ]
        whole = WholeMatrices(lambda jobs: None, 1.0)
        ranges = {part.name: part for part in parts}
        optimizer = make_optimizer(named, config.optim, ranges=ranges, whole_matrices=whole)
        assert isinstance(optimizer, MatrixOptimizer)
        (job,) = optimizer.jobs
        tensors = [torch.empty(shape) for shape in job.shapes]
        flat = [tensor.view(-1) for tensor in tensors]
        log = EventLog(device)
        for _, parameter in named:
            parameter.grad = torch.empty_like(parameter)
            log.leave_out([parameter, parameter.grad])
        log.leave_out(tensors)
        with log, torch.no_grad():
            job.collect(flat)  # makes the states
            for name, run in (
                ("collect", lambda: job.collect(flat)),
                ("compute", lambda: job.compute(tensors)),
                ("deliver", lambda: job.deliver(flat[: job.outputs])),
            ):
                log.begin_part(name)
                run()
    sizes = {name: transient_bytes(log, name) for name in ("collect", "compute", "deliver")}
    sizes["inputs"] = sum(tensor.nbytes for tensor in tensors)
    sizes["results"] = sum(tensor.nbytes for tensor in tensors[: job.outputs])
    return Recording(flops=log.flops, sizes=sizes)
