"""Follows the bytes of live tensors through real training: the model, its engine, optimizer and step as they are.

This works on real tensors and on fake ones alike; see :class:`sltrain_dist.memory.events.EventLog` for what each byte
is put to. Torch's private parts that allocate are named here; they have no hooks of their own.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.events import EventLog
from sltrain_dist.memory.record import component_of
from sltrain_dist.memory.result import Phase, Point
from sltrain_dist.models.build import build_meta_model, build_model, initial_values
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.numerics.blockwise import quantizer
from sltrain_dist.numerics.int8_weight import parts_of
from sltrain_dist.optim.state_layout import BLOCKS, MASTER
from sltrain_dist.parallel import fsdp, pieces
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.pieces import ReadChunk
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.build import build_engine
from sltrain_dist.train.dry_run import made_up_rows
from sltrain_dist.train.step import forward_backward

_register_hook = Tensor.register_post_accumulate_grad_hook


class Follower:
    """A run whose memory is followed.

    Args:
        config: The run.
        env: This process among all.
        log: Takes the events; entered by the methods.
        sends_ahead: Whether the rows of this update and the next are on the device before an update, as on a GPU.

    Attributes:
        engine: After :meth:`build`.
    """

    engine: Engine

    def __init__(self, config: Config, env: Environment, log: EventLog, *, sends_ahead: bool = False) -> None:
        self.config, self.env, self.log = config, env, log
        self._passes, self._pass, self._first_update = 1, 0, True
        passes = min(2, micro_batches_per_update(config, env.world_size))
        # The first micro-batch finds no gradients, the last one all; what is between is like the last one at most.
        self._rows = made_up_rows(config, env.rank, passes * config.train.micro_batch)
        self._sends_ahead = sends_ahead

    def build(self, model: LlamaForCausalLM, initial: ReadChunk | None = None) -> None:
        """Wraps a model in its engine.

        Args:
            model: The model; on the meta device, the engine gives it memory.
            initial: Reads the values that it is then given; None to leave it as it is.
        """
        log, engine, bits = self.log, self.config.parallel.engine, self.config.optim.state_bits
        log.begin(("init", "engine"))
        with log, self._hooks_before_others(), without_mesh():
            log.watch(model.named_modules(), self._module_begins)
            model.model.embed_tokens.register_forward_pre_hook(lambda *_: self._pass_begins(), prepend=True)
            # DDP's buckets are where the gradients will be.
            with log.within("gradients" if engine == "ddp" else "buffers.engine"):
                self.engine = build_engine(model, self.config, self.env)
                if initial is not None:
                    self.engine.load(initial, 0)
            if engine == "zero":  # all that it shards lies in the same flat tensors
                log.assign(self.engine.tensors()["parameters"], "factors")
                self._assign_model(self.engine.module, only="dense")
            else:
                self._assign_model(self.engine.module)
            for parameter in self.engine.module.parameters():
                self._watch_gradient(parameter)
        log.begin(None)
        if bits in BLOCKS:  # tables that are made once in a process, and kept
            with log, log.within("temporaries.levels"):
                for signed in (True, False):
                    tables = quantizer(bits, BLOCKS[bits], self.env.device, signed=signed)
                    log.add([tables.levels, tables.borders, tables.table])

    def update(self) -> None:
        """Makes an update of the first and the last micro-batch. The first update's moments are not reported."""
        engine, log, optim, train = self.engine, self.log, self.config.optim, self.config.train
        gc.collect()  # what the update before has left in cycles
        self._passes, self._pass = self._pass, 0
        with log, self._labels():
            self._begin("forward", "begin")
            sent = None
            if self._sends_ahead:
                with log.within("batch"):
                    sent, _ahead = (torch.empty(self._rows.shape, dtype=torch.int32) for _ in range(2))
            engine.begin_update(optim.lr, 1.0 + optim.clip)
            forward_backward(
                cast(Engine, _Batches(engine, log)),
                self._rows,
                train.micro_batch,
                self.env,
                reset_attention=self.config.data.reset_attention,
                sent=sent,
            )
            self._assign_held()
            self._begin("update", "clipping")
            engine.clip_gradients()
            self._begin("update", "optimizer")
            with log.within("temporaries.update"):
                engine.update()
            self._assign_held()
            self._watch_gathered()
        self._first_update = False

    def save(self) -> None:
        """Goes over all that a checkpoint takes."""
        self.log.begin(("save", "checkpoint"))
        with self.log, torch.no_grad(), self.log.within("temporaries.codes"):
            for _ in self.engine.chunks():  # each goes to the host before the next one is made
                pass

    def timeline(self) -> tuple[Point, ...]:
        """The largest moments of building, of the second update, and of saving."""
        points = []
        for moment in self.log.moments():
            if moment.name is not None:
                phase, where = moment.name
                parts = {name: size for name, size in sorted(moment.components.items()) if size}
                points.append(Point(cast(Phase, phase), where, parts))
        return tuple(points)

    def _assign_model(self, model: nn.Module, only: str = "") -> None:
        for name, parameter in model.named_parameters():
            component = component_of(name)
            if component.startswith(only):
                self.log.assign(parts_of(_local(parameter)).values(), component)
        for name, buffer in model.named_buffers():
            self.log.assign([buffer], "index" if ".support." in name else "dense.rotary")

    def _assign_held(self) -> None:
        self.log.assign(self.engine.tensors()["gradients"], "gradients")

    def _watch_gradient(self, parameter: Tensor) -> None:
        """Notes when there is a gradient; FSDP2's shards have theirs in :meth:`_reduces`."""
        if not isinstance(parameter, DTensor) and not vars(parameter).get("followed"):
            vars(parameter)["followed"] = True
            _register_hook(parameter, self._has_gradient)

    def _hooks_before_others(self) -> Any:
        """Makes our hook on a parameter the first one: an engine's may free the gradient."""

        def registered(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
            self._watch_gradient(parameter)
            return _register_hook(parameter, hook)

        return replaced(Tensor, "register_post_accumulate_grad_hook", registered)

    def _watch_gathered(self) -> None:
        """The same for the parameters that FSDP2 makes in the first pass, and keeps."""
        for group in _groups(self.engine.module):
            for parameter in group.fsdp_params:
                self._watch_gradient(parameter._unsharded_param)

    def _has_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.log.assign([_local(parameter.grad)], "gradients")

    def _pass_begins(self) -> None:
        self._pass += 1
        self._assign_held()

    def _module_begins(self, what: Literal["forward", "recomputation", "backward"], name: str) -> None:
        where = name.removeprefix("model.").replace("layers.", "layer ").replace(".", ", ")
        where += ", computed again" if what == "recomputation" else ""
        where = where if self._passes == 1 else f"pass {self._pass}, {where}"
        self._begin("forward" if what == "forward" else "backward", where)

    def _begin(self, phase: Phase, where: str) -> None:
        self.log.begin(None if self._first_update else (phase, where))

    @contextmanager
    def _labels(self) -> Iterator[None]:
        """Puts what an update allocates outside of modules to its component."""
        log = self.log

        def stepped(optimizer: torch.optim.Optimizer, *unused: Any) -> None:
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        component = {MASTER: "master_weights", "step": "temporaries.scalars"}.get(key, "states")
                        log.assign([value], component)
            log.leave()

        with ExitStack() as stack:
            for hook in (
                register_optimizer_step_pre_hook(lambda *_: log.enter("temporaries.update")),
                register_optimizer_step_post_hook(stepped),
            ):
                stack.callback(hook.remove)
            stack.enter_context(_within(log, DistributedDataParallel, "_pre_forward", "gradients"))
            stack.enter_context(_within(log, FSDPParamGroup, "unshard", "buffers.gathered"))
            stack.enter_context(_within(log, FSDPParamGroup, "wait_for_unshard", "buffers.gathered"))
            stack.enter_context(_within(log, FSDPParamGroup, "post_backward", "buffers.reduced", self._reduces))
            stack.enter_context(_within(log, pieces.Replicated, "all_reduce", "buffers.messages", self._sends))
            yield

    @contextmanager
    def _reduces(self, group: FSDPParamGroup) -> Iterator[None]:
        """FSDP2's reduce-scatter: gradients go in, gradients come out, and buffers are between."""
        for parameter in group.fsdp_params:
            if hasattr(parameter, "_unsharded_param"):
                self._has_gradient(parameter._unsharded_param)
        yield
        waiting = [p.unsharded_accumulated_grad for p in group.fsdp_params]
        reduced = [p.sharded_param.grad for p in group.fsdp_params]
        self.log.assign([_local(grad) for grad in (*waiting, *reduced) if grad is not None], "gradients")

    @contextmanager
    def _sends(self, replicas: pieces.Replicated) -> Iterator[None]:
        """The all-reduce of what is whole on every rank."""
        self._begin("backward", "all-reduce")
        yield


def follow(config: Config, env: Environment) -> tuple[Point, ...]:
    """Trains for two updates on real tensors, on this rank of those that there are; the second one's timeline."""
    follower = Follower(config, env, EventLog("cpu"))
    if config.parallel.engine == "ddp":
        follower.build(build_model(config, env.device))
    else:
        model = build_meta_model(config)
        follower.build(model, initial_values(model))
    follower.update()
    follower.update()
    follower.save()
    return follower.timeline()


class _Batches:
    """An engine whose batches are seen.

    Args:
        engine: What everything is asked of.
        log: Is told of each batch.
    """

    def __init__(self, engine: Engine, log: EventLog) -> None:
        self._engine, self._log = engine, log

    def micro_step(self, input_ids: Tensor, labels: Tensor, weight: float, **rest: Any) -> Tensor:
        """See :meth:`sltrain_dist.parallel.engine.Engine.micro_step`."""
        batch = (input_ids, labels, rest.get("positions"))
        self._log.assign([tensor for tensor in batch if tensor is not None], "batch")
        return self._engine.micro_step(input_ids, labels, weight, **rest)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of torch's, which has no hook there, within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _within(log: EventLog, owner: type, name: str, component: str, around: Any = None) -> Any:
    """What a method allocates belongs to a component; `around` is entered around it, with the object."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if around is not None:
                stack.enter_context(around(self))
            with log.within(component):
                return method(self, *args, **kwargs)

    return replaced(owner, name, wrapped)


def without_mesh() -> Any:
    """A mesh of ranks is a few numbers on the host. And it is looked into, which fake tensors do not bear."""
    make_mesh = fsdp._mesh

    def mesh(*args: Any) -> Any:
        with _disable_current_modes():
            return make_mesh(*args)

    return replaced(fsdp, "_mesh", mesh)


def _groups(module: nn.Module) -> list[FSDPParamGroup]:
    states = (getattr(part, "_get_fsdp_state", None) for part in module.modules())
    groups = (state()._fsdp_param_group for state in states if state is not None)
    return [group for group in groups if group is not None]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
