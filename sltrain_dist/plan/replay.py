"""Replays of a training step on fake tensors, which find the memory of any rank of a run without allocating it.

The model, engine, optimizer and training step are the real ones. Fake tensors have shapes and types but no memory
(torch's FakeTensorMode). A fake process group stands for the other ranks, and its collectives do nothing. The second of
two updates is reported, because the optimizer states are allocated from the first one on.
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
from sltrain_dist.memory.result import Estimate, Point
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.parallel import ddp, fsdp
from sltrain_dist.plan.follow import Follower, replaced
from sltrain_dist.runtime.environment import Environment


def replay(config: Config, ranks: int = 1, rank: int = 0, *, device: DeviceType = "cuda") -> Estimate:
    """Measures the memory of a run by replaying it on fake tensors, see :func:`replayed_timeline`.

    All values except the timeline are those of :func:`estimate`.
    """
    timeline = replayed_timeline(config, ranks, rank, device=device)
    return replace(estimate(config, ranks=ranks), timeline=timeline, method="replay")


def replayed_timeline(
    config: Config, ranks: int = 1, rank: int = 0, *, device: DeviceType = "cuda"
) -> tuple[Point, ...]:
    """Replays a run on fake tensors and returns the timeline of its memory, see :meth:`Follower.run`.

    A compiled run is replayed as an eager one, which may take more or less memory.

    Args:
        config: The run; `parallel.engine: zero` is not supported, because DeepSpeed reads the values of tensors.
        ranks: World size.
        rank: Rank whose memory is measured; rank 0 stores the most.
        device: Device whose operators the run uses; "cuda" needs no GPU.

    Raises:
        ConfigError: The run cannot be replayed, or not be trained on this number of ranks.
        RuntimeError: This process already has a process group.
    """
    if config.parallel.engine == "zero":
        raise ConfigError(
            "parallel.engine=zero cannot be replayed on fake tensors; plan it without --replay (such plans are "
            "checked against live bytes of real runs), or set parallel.engine=fsdp"
        )
    if config.parallel.cpu_offload:
        raise ConfigError(
            "parallel.cpu_offload=true cannot be replayed: all fake tensors are on one device; leave out --replay"
        )
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank = {rank} is outside 0 … ranks − 1 = {ranks - 1}")
    if dist.is_initialized():
        raise RuntimeError("a replay creates a process group, but this process already has one; use a new process")
    micro_batches_per_update(config, ranks)
    eager = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    model = build_meta_model(eager)
    with fake_rank(config, rank, ranks, device) as env:
        return Follower(eager, env, device).run(model)


@contextmanager
def fake_rank(config: Config, rank: int, ranks: int, device: DeviceType) -> Iterator[Environment]:
    """Makes this process one of several ranks, on fake tensors. Takes the arguments of :func:`replay`."""
    with ExitStack() as stack:
        if ranks > 1 or config.parallel.engine != "ddp":
            stack.enter_context(_fake_group(rank, ranks))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # for the meta tensors of the model
        stack.enter_context(replaced(fsdp, "_mesh", _mesh))
        stack.enter_context(replaced(FSDPParam, "reset_sharded_param", _reset_once))
        stack.enter_context(replaced(ddp, "DistributedDataParallel", _DDPWithoutReduction))
        stack.enter_context(operators_of(device, config))
        yield _FakeEnvironment(rank, ranks, rank, torch.device("cpu"))


class _FakeEnvironment(Environment):
    """A rank of a fake process group; reductions assume that all ranks have its values."""

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
    """Makes a mesh of ranks on real tensors, because its values are read; it takes a few bytes on the host."""
    with _disable_current_modes():
        return _make_mesh(*args)


_reset_sharded_param = FSDPParam.reset_sharded_param


def _reset_once(parameter: FSDPParam) -> None:
    """Skips FSDP2's check, by address, that the shards have not been replaced: fake tensors have no addresses."""
    if parameter._sharded_param_data.is_meta:
        _reset_sharded_param(parameter)


class _DDPWithoutReduction(DistributedDataParallel):
    """DDP that neither sends nor rearranges its buckets: both need values, and leave the memory unchanged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda _, bucket: _completed(bucket.buffer()))
        self.reducer = _ReducerWithoutRebuild(self.reducer)  # type: ignore[assignment]


class _ReducerWithoutRebuild:
    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _completed(result: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(result)
    return future
