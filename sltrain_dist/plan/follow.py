"""The live bytes of a short training run with the real model, engine, optimizer and training step.

This works on real and on fake tensors; :class:`sltrain_dist.memory.events.EventLog` finds the component of each byte.
Private parts of torch that allocate memory are patched, because they have no hooks.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.events import EventLog
from sltrain_dist.memory.record import component_of
from sltrain_dist.memory.result import Point
from sltrain_dist.models.build import build_meta_model, build_model, initial_values
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.numerics.blockwise import quantizer
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.numerics.int8_weight import parts_of
from sltrain_dist.optim.state_layout import GROUP_SIZES, MASTER
from sltrain_dist.parallel.pieces import ReadRange, Replicated
from sltrain_dist.parallel.whole_layers import restart
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.build import build_engine
from sltrain_dist.train.dry_run import made_up_rows
from sltrain_dist.train.step import forward_backward

_UPDATE_BEGINS = ("forward", "begin")
_register_hook = Tensor.register_post_accumulate_grad_hook


def follow(config: Config, env: Environment) -> tuple[Point, ...]:
    """Trains for two updates on real tensors and returns this rank's timeline, see :meth:`Follower.run`."""
    if config.parallel.engine == "ddp":
        return Follower(config, env, "cpu").run(build_model(config, env.device))
    model = build_meta_model(config)
    return Follower(config, env, "cpu").run(model, initial_values(model))


class Follower:
    """A short training run whose memory is followed.

    Args:
        config: Configuration of the run.
        env: Rank and device of this process.
        device: Device whose operators the tensors stand for. A GPU has the rows of this update and of the next in
            memory before an update begins.
    """

    def __init__(self, config: Config, env: Environment, device: DeviceType) -> None:
        optim = config.optim.model_copy(update={"projection_every": 1})  # the second update too makes new projections
        self.config = config.model_copy(update={"optim": optim})
        self.env, self.device, self.log = env, device, EventLog(device)
        self._passes, self._pass = 1, 0  # number of forward passes in the last update, and in this one so far

    def run(self, model: LlamaForCausalLM, initial: ReadRange | None = None) -> tuple[Point, ...]:
        """Trains for two updates, makes a restart if the run has any, and makes the tensors of a checkpoint.

        Args:
            model: The model; if it is on the meta device, its engine allocates it.
            initial: Reads the initial values; None to keep the values of the model.

        Returns:
            The largest moments of building the engine, of the second update, of a restart, and of saving.
        """
        with self._patches():
            self._build(model, initial)
            self._update()  # makes the optimizer's states
            self._update()
            self._restart()
            self._save()
        moments = self.log.moments()
        second = max(index for index, moment in enumerate(moments) if moment.name == _UPDATE_BEGINS)
        return tuple(
            Point(
                moment.name[0], moment.name[1], {name: size for name, size in sorted(moment.components.items()) if size}
            )
            for moment in (moments[1], *moments[second:])
        )

    def _build(self, model: LlamaForCausalLM, initial: ReadRange | None) -> None:
        log, bits = self.log, self.config.optim.state_bits
        log.begin(("init", "engine"))
        log.watch(model.named_modules(), self._module_begins)
        model.register_forward_pre_hook(self._pass_begins)
        with log, log.within("buffers.engine"):
            self.engine = build_engine(model, self.config, self.env)
            if initial is not None:
                self.engine.load(initial, 0)
            log.assign(self.engine.tensors()["parameters"], "factors")  # the flat tensors of ZeRO
            for name, parameter in model.named_parameters():
                log.assign(parts_of(_local(parameter)).values(), component_of(name))
            for name, buffer in model.named_buffers():
                log.assign([buffer], "index" if ".support." in name else "dense.rotary")
        log.begin(None)  # nothing is reported until the second update
        with log, log.within("temporaries.levels"):
            for signed in (True, False) if bits in GROUP_SIZES else ():  # allocated once in a process, and kept
                tables = quantizer(bits, GROUP_SIZES[bits], self.env.device, signed=signed)
                log.add([tables.levels, tables.borders, tables.table])

    def _update(self) -> None:
        """Runs an update of one or two micro-batches: the first finds no accumulated gradients, the last finds all."""
        engine, log, optim, train = self.engine, self.log, self.config.optim, self.config.train
        passes = micro_batches_per_update(self.config, self.env.world_size)
        rows = made_up_rows(self.config, self.env.rank, min(2, passes) * train.micro_batch)
        gc.collect()  # frees cyclic garbage of the last update
        self._passes, self._pass = self._pass, 0
        log.begin(_UPDATE_BEGINS)
        with log:
            with log.within("batch"):
                on_gpu = self.device == "cuda"
                shape = (passes * train.micro_batch, rows.shape[1])
                device_rows = [torch.empty(shape, dtype=torch.int32) for _ in range(2)] if on_gpu else []
            engine.begin_update(optim.lr, 1.0 + optim.clip)
            forward_backward(
                engine,
                rows,
                train.micro_batch,
                self.env,
                reset_attention=self.config.data.reset_attention,
                sent=device_rows[0] if device_rows else None,
            )
            self._assign_gradients()
            log.begin(("update", "clipping"))
            engine.clip_gradients()
            log.begin(("update", "optimizer"))
            engine.update()

    def _restart(self) -> None:
        """Makes a restart, if the run makes any; really it would be at the beginning of the next update."""
        if self.config.reparam.restart_every:
            self.log.begin(("restart", "low-rank products"))
            with self.log, self.log.within("temporaries.restart"):
                restart(self.engine, self.config, self.env)

    def _save(self) -> None:
        """Makes the tensors of a checkpoint; each is freed before the next one is made."""
        self.log.begin(("save", "checkpoint"))
        with self.log, torch.no_grad(), self.log.within("temporaries.codes"):
            for _ in self.engine.saved_ranges():
                pass

    # Names of moments

    def _pass_begins(self, model: Any, batch: tuple[Tensor | None, ...]) -> None:
        self._pass += 1
        self.log.assign([tensor for tensor in batch if tensor is not None], "batch")
        self._assign_gradients()

    def _module_begins(self, what: Literal["forward", "recomputation", "backward"], name: str) -> None:
        where = name.removeprefix("model.").replace("layers.", "layer ").replace(".", ", ")
        where += ", recomputed" if what == "recomputation" else ""
        where = where if self._passes == 1 else f"pass {self._pass}, {where}"
        self.log.begin(("forward" if what == "forward" else "backward", where))

    # Components

    def _assign_gradients(self) -> None:
        self.log.assign(self.engine.tensors()["gradients"], "gradients")

    def _assign_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.log.assign([_local(parameter.grad)], "gradients")

    @contextmanager
    def _patches(self) -> Iterator[None]:
        """Assigns components to the memory that torch and the engines allocate outside of modules."""
        log = self.log

        def register_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
            def after_assigning(parameter: Tensor) -> None:
                self._assign_gradient(parameter)
                hook(parameter)  # may free the gradient

            return _register_hook(parameter, after_assigning)

        def after_step(optimizer: torch.optim.Optimizer, *unused: Any) -> None:
            log.leave()
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        component = {MASTER: "master_weights", "step": "temporaries.scalars"}.get(key, "states")
                        log.assign([value], component)

        def before_reduction(group: FSDPParamGroup) -> None:
            for parameter in group.fsdp_params:
                if hasattr(parameter, "_unsharded_param"):
                    self._assign_gradient(parameter._unsharded_param)
                if parameter.unsharded_accumulated_grad is not None:
                    log.assign([parameter.unsharded_accumulated_grad], "gradients")

        def before_all_reduce(replicas: Replicated) -> None:
            log.begin(("backward", "all-reduce"))

        with ExitStack() as stack:
            stack.enter_context(replaced(Tensor, "register_post_accumulate_grad_hook", register_hook))
            for hook in (
                register_optimizer_step_pre_hook(lambda *_: log.enter("temporaries.update")),
                register_optimizer_step_post_hook(after_step),
            ):
                stack.callback(hook.remove)
            for owner, name, component, before in (
                (FSDPParamGroup, "unshard", "buffers.gathered", None),
                (FSDPParamGroup, "wait_for_unshard", "buffers.gathered", None),
                (FSDPParamGroup, "post_backward", "buffers.reduced", before_reduction),
                (Replicated, "all_reduce", "buffers.messages", before_all_reduce),
            ):
                stack.enter_context(self._within(owner, name, component, before))
            yield

    def _within(self, owner: type, name: str, component: str, before: Callable[[Any], None] | None) -> Any:
        """Patches a method so that its allocations belong to a component; `before` is called with its object first."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def wrapped(this: Any, *args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(this)
            with self.log.within(component):
                return method(this, *args, **kwargs)

        return replaced(owner, name, wrapped)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of an object within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
