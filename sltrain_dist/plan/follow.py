"""Follows the bytes of live tensors through real training: the model, its engine, optimizer and step as they are.

On real tensors and on fake ones alike. Every storage is put to a component by where it was made, and moved to
another one when its role shows: what autograd saves becomes an activation, what lands in `.grad` a gradient.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.result import Phase, Point
from sltrain_dist.models.build import build_meta_model, build_model, initial_values
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.numerics import blockwise
from sltrain_dist.numerics.int8_weight import parts_of
from sltrain_dist.optim import low_bit
from sltrain_dist.optim.state_layout import MASTER
from sltrain_dist.parallel import fsdp, held
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.environment import Environment
from sltrain_dist.parallel.held import ReadChunk
from sltrain_dist.parallel.partition import is_factor
from sltrain_dist.tracking.live_bytes import OTHER, LiveBytes
from sltrain_dist.train import step as training_step
from sltrain_dist.train.build import build_engine
from sltrain_dist.train.dry_run import made_up_rows

_KINDS = {
    "embed_tokens": "residual",
    "input_layernorm": "norms",
    "self_attn": "attention",
    "post_attention_layernorm": "norms",
    "mlp": "mlp",
    "norm": "norms",
    "lm_head": "loss",
}
"""Modules that the timeline names, and the kind of activations that come from them."""

_register_hook = Tensor.register_post_accumulate_grad_hook


class Follower:
    """A run whose memory is followed.

    Args:
        config: The run.
        env: This process among all.
        tracker: Counts the bytes; entered by the methods.

    Attributes:
        engine: After :meth:`build`.
    """

    engine: Engine

    def __init__(self, config: Config, env: Environment, tracker: LiveBytes) -> None:
        self.config, self.env, self.tracker = config, env, tracker
        self._backward = False
        self._kind, self._passes, self._pass, self._built = OTHER, 1, 0, 0
        self._levels: dict[Any, Any] = {}
        passes = min(2, micro_batches_per_update(config, env.world_size))
        # The first micro-batch finds no gradients, the last one all; what is between is like the last one at most.
        self._rows = made_up_rows(config, env.rank, passes * config.train.micro_batch)

    def build(self, model: LlamaForCausalLM, initial: ReadChunk | None = None) -> None:
        """Wraps a model in its engine.

        Args:
            model: The model; on the meta device, the engine gives it memory.
            initial: Reads the values that it is then given; None to leave it as it is.
        """
        tracker, engine = self.tracker, self.config.parallel.engine
        tracker.begin(("init", "engine"))
        with tracker, self._hooks_before_others(), without_mesh():
            self._watch(model)
            # DDP's buckets are where the gradients will be.
            with tracker.within("gradients" if engine == "ddp" else "buffers.engine"):
                self.engine = build_engine(model, self.config, self.env)
                if initial is not None:
                    self.engine.load(initial, 0)
            if engine == "zero":  # all that it shards lies in the same flat tensors
                tracker.assign(self.engine.tensors()["parameters"], "factors")
                self._assign_model(self.engine.module, only="dense")
            else:
                self._assign_model(self.engine.module)
            for parameter in self.engine.module.parameters():
                self._watch_gradient(parameter)
        self._built = len(tracker.stretches)

    def prepare(self) -> None:
        """Makes a first update, so that there are optimizer states; our own optimizer skips its arithmetic."""

        def no_update(optimizer: low_bit.LowBitAdam, parameter: Tensor, state: low_bit.State, *unused: Any) -> None:
            for key in state:
                name, _, form = key.partition(".")
                if form == "codes":
                    optimizer._quantizer(parameter, name)

        with mock.patch.object(low_bit.LowBitAdam, "_update", no_update):
            self.update()
        del self.tracker.stretches[self._built :]

    def update(self) -> None:
        """Makes an update of the first and the last micro-batch."""
        engine, tracker, optim = self.engine, self.tracker, self.config.optim
        gc.collect()  # what the update before has left in cycles
        self._passes, self._pass, self._backward = self._pass, 0, False
        with tracker, self._scopes():
            tracker.begin(("forward", "begin"))
            engine.begin_update(optim.lr, 1.0 + optim.clip)
            training_step.forward_backward(
                engine,
                self._rows,
                self.config.train.micro_batch,
                self.env,
                reset_attention=self.config.data.reset_attention,
            )
            self._assign_held()
            tracker.begin(("update", "clipping"))
            engine.clip_gradients()
            tracker.begin(("update", "optimizer"))
            with tracker.within("temporaries.update"):
                engine.update()
            self._assign_held()
            self._watch_gathered()

    def save(self) -> None:
        """Goes over all that a checkpoint takes."""
        tracker = self.tracker
        tracker.begin(("save", "checkpoint"))
        with tracker, torch.no_grad():
            for _ in self.engine.chunks():  # each goes to the host before the next one is made
                pass

    def timeline(self) -> tuple[Point, ...]:
        """The largest moments of what was followed since the tracker began."""
        points = []
        for stretch in self.tracker.stretches:
            if stretch.name is None:
                continue
            phase, where = stretch.name
            parts = {name: size for name, size in sorted(stretch.components.items()) if size}
            points.append(Point(cast(Phase, phase), where, parts))
        return tuple(points)

    def _assign_model(self, model: nn.Module, only: str = "") -> None:
        for name, parameter in model.named_parameters():
            component = component_of(name)
            if component.startswith(only):
                self.tracker.assign(parts_of(_local(parameter)).values(), component)
        for name, buffer in model.named_buffers():
            self.tracker.assign([buffer], "index" if ".support." in name else "dense")

    def _assign_held(self) -> None:
        tensors = self.engine.tensors()
        self.tracker.assign(tensors["gradients"], "gradients")
        self.tracker.assign(tensors["states"], "states", only="temporaries")

    def _watch(self, model: LlamaForCausalLM) -> None:
        """Hooks that say where a pass is."""
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in _KINDS:
                where = name.removeprefix("model.").replace("layers.", "block ").replace(".", ", ")
                kind = _KINDS[name.rpartition(".")[2]]
                module.register_forward_pre_hook(functools.partial(self._enters, where, kind))
                module.register_forward_hook(functools.partial(self._leaves, where))

    def _watch_gradient(self, parameter: Tensor) -> None:
        """A hook that says when there is a gradient; FSDP2's shards have theirs in :meth:`_reductions`."""
        if not isinstance(parameter, DTensor) and not vars(parameter).get("followed"):
            vars(parameter)["followed"] = True
            _register_hook(parameter, self._has_gradient)

    def _hooks_before_others(self) -> Any:
        """Makes our hook on a parameter the first one: an engine's may free the gradient."""

        def registered(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
            self._watch_gradient(parameter)
            return _register_hook(parameter, hook)

        return mock.patch.object(Tensor, "register_post_accumulate_grad_hook", registered)

    def _watch_gathered(self) -> None:
        """The same for the parameters that FSDP2 makes in the first pass, and keeps."""
        for group in _groups(self.engine.module):
            for parameter in group.fsdp_params:
                self._watch_gradient(parameter._unsharded_param)

    def _enters(self, where: str, kind: str, module: nn.Module, inputs: Any) -> None:
        if where == "embed_tokens":
            self._backward = False
            self._pass += 1
            self._assign_held()
        self._kind = kind
        if self._backward:
            self._begin("backward", f"{where}, computed again")
        else:
            self._begin("forward", where)

    def _leaves(self, where: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not self._backward:
            # What is not gone by now is kept for the backward pass, or by the next module's.
            self.tracker.rename(OTHER, f"activations.{self._kind}")
        if output.requires_grad:
            output.register_hook(lambda _: self._goes_back(where))

    def _goes_back(self, where: str) -> None:
        self._backward = True
        self._begin("backward", where)

    def _begin(self, phase: Phase, where: str) -> None:
        self.tracker.begin((phase, where if self._passes == 1 else f"pass {self._pass}, {where}"))

    def _has_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.tracker.assign([_local(parameter.grad)], "gradients")

    def _saved(self, tensor: Tensor) -> Tensor:
        self.tracker.assign([tensor], f"activations.{self._kind}", only=OTHER)
        return tensor

    @contextmanager
    def _scopes(self) -> Iterator[None]:
        """Puts what the code of training makes to its component, by the function that makes it."""
        tracker = self.tracker

        def scoped(owner: Any, name: str, component: str) -> Any:
            function = getattr(owner, name)

            @functools.wraps(function)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with tracker.within(component):
                    return function(*args, **kwargs)

            return mock.patch.object(owner, name, wrapped)

        with ExitStack() as stack:
            stack.enter_context(scoped(training_step, "to_batch", "batch"))
            stack.enter_context(scoped(held, "_step", "temporaries.update"))
            stack.enter_context(scoped(DistributedDataParallel, "_pre_forward", "gradients"))
            stack.enter_context(scoped(FSDPParamGroup, "unshard", "buffers.gathered"))
            stack.enter_context(scoped(FSDPParamGroup, "wait_for_unshard", "buffers.gathered"))
            stack.enter_context(self._messages())
            stack.enter_context(self._reductions())
            stack.enter_context(self._new_states())
            stack.enter_context(self._recomputation())
            stack.enter_context(saved_tensors_hooks(self._saved, lambda tensor: tensor))
            # Tables of levels are kept for good, and would be there from an earlier run in this process, or not.
            stack.enter_context(mock.patch.object(low_bit, "quantizer", self._quantizer))
            stack.enter_context(mock.patch.object(blockwise, "_made", {}))
            yield

    def _quantizer(self, *key: Any, signed: bool) -> blockwise.Quantizer:
        if (*key, signed) not in self._levels:
            with self.tracker.within("temporaries.levels"):
                self._levels[*key, signed] = blockwise.quantizer(*key, signed=signed)
        return self._levels[*key, signed]

    def _messages(self) -> Any:
        """The all-reduce of what is whole on every rank."""
        all_reduce = held.Replicated.all_reduce

        def wrapped(replicas: held.Replicated, *args: Any) -> None:
            self.tracker.begin(("backward", "all-reduce"))
            with self.tracker.within("buffers.messages"):
                all_reduce(replicas, *args)

        return mock.patch.object(held.Replicated, "all_reduce", wrapped)

    def _reductions(self) -> Any:
        """FSDP2's reduce-scatter: gradients go in, gradients come out, and buffers are between."""
        post_backward = FSDPParamGroup.post_backward
        assign = self.tracker.assign

        def wrapped(group: FSDPParamGroup, *unused: Any) -> None:
            for parameter in group.fsdp_params:
                if hasattr(parameter, "_unsharded_param"):
                    self._has_gradient(parameter._unsharded_param)
            with self.tracker.within("buffers.reduced"):
                post_backward(group, *unused)
            waiting = [p.unsharded_accumulated_grad for p in group.fsdp_params]
            reduced = [p.sharded_param.grad for p in group.fsdp_params]
            assign([_local(grad) for grad in (*waiting, *reduced) if grad is not None], "gradients")

        return mock.patch.object(FSDPParamGroup, "post_backward", wrapped)

    def _new_states(self) -> Any:
        make_state = low_bit.LowBitAdam.make_state

        def wrapped(optimizer: low_bit.LowBitAdam, parameter: Tensor) -> low_bit.State:
            state = make_state(optimizer, parameter)
            for key, value in state.items():
                if isinstance(value, Tensor):
                    self.tracker.assign([value], "master_weights" if key == MASTER else "states")
            return state

        return mock.patch.object(low_bit.LowBitAdam, "make_state", wrapped)

    def _recomputation(self) -> Any:
        """Activation checkpointing takes saved tensors from autograd with hooks of its own, which come before ours.

        Those of the first pass keep nothing; those of a pass that is made again do.
        """
        init = saved_tensors_hooks.__init__

        def wrapped(hooks: saved_tensors_hooks, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
            init(hooks, (lambda tensor: pack(self._saved(tensor))) if self._backward else pack, unpack)

        return mock.patch.object(saved_tensors_hooks, "__init__", wrapped)


def follow(config: Config, env: Environment) -> tuple[Point, ...]:
    """Trains for two updates on real tensors, on this rank of those that there are; the second one's timeline."""
    follower = Follower(config, env, LiveBytes())
    if config.parallel.engine == "ddp":
        follower.build(build_model(config, env.device))
    else:
        model = build_meta_model(config)
        follower.build(model, initial_values(model))
    follower.prepare()
    follower.update()
    follower.save()
    return follower.timeline()


def component_of(name: str) -> str:
    """The component of a named parameter."""
    last = name.rpartition(".")[2]
    if not is_factor(name) or last not in ("B", "A", "V"):
        return "dense"
    return "sparse_values" if last == "V" else "factors"


def without_mesh() -> Any:
    """A mesh of ranks is a few numbers on the host. And it is looked into, which fake tensors do not bear."""
    make_mesh = fsdp._mesh

    def mesh(*args: Any) -> Any:
        with _disable_current_modes():
            return make_mesh(*args)

    return mock.patch.object(fsdp, "_mesh", mesh)


def _groups(module: nn.Module) -> list[FSDPParamGroup]:
    states = (getattr(part, "_get_fsdp_state", None) for part in module.modules())
    groups = (state()._fsdp_param_group for state in states if state is not None)
    return [group for group in groups if group is not None]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
