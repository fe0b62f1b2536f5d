"""A training step on fake tensors: what a run takes on one rank of any number, without allocating it.

The model, engine, optimizer and step are those that train. Fake tensors have shapes and types and no memory
(torch's FakeTensorMode); a fake process group stands for the other ranks, and its collectives do nothing. Two
updates are made, and the second is reported, beside whose forward and backward pass the optimizer's states are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.events import EventLog
from sltrain_dist.memory.operators import operators_of
from sltrain_dist.memory.result import Estimate
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.plan.follow import Follower, replaced
from sltrain_dist.runtime.environment import Environment

T = TypeVar("T")


def replay(config: Config, ranks: int = 1, rank: int = 0, *, device: Literal["cuda", "cpu"] = "cuda") -> Estimate:
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
    with fake_rank(config, rank, ranks, device) as (env, log):
        follower = Follower(eager, env, log, sends_ahead=device == "cuda")
        follower.build(meta_model(eager))
        _without_messages(follower.engine)
        follower.update()  # makes the optimizer's states
        follower.update()
        follower.save()
    return replace(estimate(config, ranks=ranks), timeline=follower.timeline(), method="replay")


@contextmanager
def fake_rank(
    config: Config, rank: int, ranks: int, device: Literal["cuda", "cpu"]
) -> Iterator[tuple[Environment, EventLog]]:
    """One of several ranks, on fake tensors, and what counts their bytes. Arguments as of :func:`replay`."""
    with ExitStack() as stack:
        if ranks > 1 or config.parallel.engine != "ddp":
            stack.enter_context(_fake_group(rank, ranks))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # the meta tensors of `meta_model`
        stack.enter_context(_fakeable())
        if device == "cuda":
            stack.enter_context(operators_of("cuda", config))
        yield Alone(rank, ranks, rank, torch.device("cpu")), EventLog(device)


class Alone(Environment):
    """A rank whose peers say what it says."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def on_main(self, action: Callable[[], T]) -> T:
        return action()

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.world_size > 1:
            torch.tensor(values, dtype=torch.float64, device=self.device)  # the message
        return [self.world_size * value for value in values] if op == dist.ReduceOp.SUM else list(values)


def meta_model(config: Config) -> LlamaForCausalLM:
    """The model on the meta device. An engine that is built under FakeTensorMode gives it fake memory."""
    with _disable_current_modes():  # fake parameters on the meta device could not be swapped for others
        return build_meta_model(config)


@contextmanager
def _fake_group(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _fakeable() -> Iterator[None]:
    """Without what looks at the addresses of tensors, which fake ones do not have."""
    reset = FSDPParam.reset_sharded_param

    def reset_once(parameter: FSDPParam) -> None:
        # Before the first pass it would see by addresses that nobody has replaced the shards.
        if parameter._sharded_param_data.is_meta:
            reset(parameter)

    with replaced(FSDPParam, "reset_sharded_param", reset_once):
        yield


def _without_messages(engine: Engine) -> None:
    """DDP's buckets stay as they are: sending and rearranging them takes values, and no other amount of memory."""
    ddp = engine._ddp if isinstance(engine, DDPEngine) else None
    if ddp is None:
        return

    ddp.register_comm_hook(None, lambda _, bucket: _done(bucket.buffer()))
    ddp.reducer = _Reducer(ddp.reducer)  # type: ignore[assignment]


def _done(result: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(result)
    return future


class _Reducer:
    """DDP's reducer, which never rearranges its buckets."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False
