"""A training step on fake tensors: what a run takes on one rank of any number, without allocating it.

The model, engine, optimizer and step are those that train. Fake tensors have shapes and types and no memory
(torch's FakeTensorMode); a fake process group stands for the other ranks, and its collectives do nothing. Two
updates are made, and the second is reported, beside whose forward and backward pass the optimizer's states are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.operators import operators_of
from sltrain_dist.memory.result import Estimate
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.parallel import ddp, fsdp
from sltrain_dist.plan.follow import Follower, replaced
from sltrain_dist.runtime.environment import Environment


def replay(config: Config, ranks: int = 1, rank: int = 0, *, device: DeviceType = "cuda") -> Estimate:
    """What a run takes, by replaying it on fake tensors.

    Compiled runs are replayed as eager ones, which may take more or less.
    Everything but the timeline is as :func:`estimate` says.

    Args:
        config: The run; not with `parallel.engine: zero`, whose code reads what tensors hold.
        ranks: World size.
        rank: Whose memory; 0 holds the most.
        device: Whose operators. cuda: a GPU's, with or without one here.

    Raises:
        ConfigError: The run cannot be replayed, or not be made on so many ranks.
        RuntimeError: This process has a process group; replay in a process of its own.
    """
    if config.parallel.engine == "zero":
        raise ConfigError(
            "parallel.engine=zero cannot be replayed on fake tensors; plan it without --replay (such plans are "
            "checked against live bytes of real runs), or set parallel.engine=fsdp"
        )
    if config.parallel.cpu_offload:
        raise ConfigError(
            "parallel.cpu_offload=true cannot be replayed: fake tensors here have one device; leave --replay out"
        )
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank = {rank} is outside 0 … ranks − 1 = {ranks - 1}")
    if dist.is_initialized():
        raise RuntimeError("a replay makes a process group of its own, and there is one in this process")
    micro_batches_per_update(config, ranks)
    eager = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    model = build_meta_model(eager)
    with fake_rank(config, rank, ranks, device) as env:
        timeline = Follower(eager, env, device).run(model)
    return replace(estimate(config, ranks=ranks), timeline=timeline, method="replay")


@contextmanager
def fake_rank(config: Config, rank: int, ranks: int, device: DeviceType) -> Iterator[Environment]:
    """One of several ranks, on fake tensors. Arguments as of :func:`replay`."""
    with ExitStack() as stack:
        if ranks > 1 or config.parallel.engine != "ddp":
            stack.enter_context(_fake_group(rank, ranks))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # the meta tensors of the model
        stack.enter_context(replaced(fsdp, "_mesh", _mesh))
        stack.enter_context(replaced(FSDPParam, "reset_sharded_param", _reset_once))
        stack.enter_context(replaced(ddp, "DistributedDataParallel", _StillDDP))
        stack.enter_context(operators_of(device, config))
        yield _Alone(rank, ranks, rank, torch.device("cpu"))


class _Alone(Environment):
    """A rank whose peers say what it says."""

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.world_size > 1:
            torch.tensor(values, dtype=torch.float64, device=self.device)  # the message
        return [self.world_size * value for value in values] if op == dist.ReduceOp.SUM else list(values)


@contextmanager
def _fake_group(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


_make_mesh = fsdp._mesh


def _mesh(*args: Any) -> Any:
    """Makes a mesh of ranks on real tensors, because it is looked into; it is a few numbers on the host."""
    with _disable_current_modes():
        return _make_mesh(*args)


_reset_sharded_param = FSDPParam.reset_sharded_param


def _reset_once(parameter: FSDPParam) -> None:
    """Leaves out FSDP2's check, by address, that nobody has replaced the shards. Fake tensors have no addresses."""
    if parameter._sharded_param_data.is_meta:
        _reset_sharded_param(parameter)


class _StillDDP(DistributedDataParallel):
    """DDP whose buckets stay as they are: sending and rearranging them takes values, and no other amount of memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda _, bucket: _done(bucket.buffer()))
        self.reducer = _StillReducer(self.reducer)  # type: ignore[assignment]


class _StillReducer:
    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _done(result: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(result)
    return future
