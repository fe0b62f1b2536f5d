"""Recordings of the training code: its modules and optimizers run on fake tensors, which have shapes and no memory.

A decoder layer is recorded by itself, between a given input and a given gradient of its output, and what is before and
after the layers around a gap. So a recording of each distinct layer serves models of any depth.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from sltrain_dist.config.schema import Config, OptimConfig
from sltrain_dist.memory.events import EventLog
from sltrain_dist.memory.operators import operators_of
from sltrain_dist.memory.recording import (
    EndsRecording,
    EvaluationRecording,
    LayerRecording,
    Parameter,
    Pass,
    StepRecording,
)
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.models.llama import LlamaForCausalLM, document_mask
from sltrain_dist.numerics.device import DeviceType, emulate
from sltrain_dist.numerics.int8_weight import Int8Weight, parts_of
from sltrain_dist.optim.factory import make_optimizer
from sltrain_dist.optim.state_layout import Place
from sltrain_dist.parallel.checkpointing import prepare_layers
from sltrain_dist.parallel.partition import is_factor, is_sharded

RESIDUAL, RESIDUAL_GRADIENT = "activations.residual", "temporaries.residual"
"""Components of what goes from one layer to the next, and of its gradient."""
SHARED = ("activations.rotary", "activations.rotary", "activations.mask")
"""Components of what all layers are given: cosines, sines and the mask."""
_ATTENTION_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_NOTHING = Pass(())

Build = Callable[[Config], Any]
"""Makes a model of fake tensors whose modules are named and called as those of `LlamaForCausalLM`."""


def fake_model(config: Config) -> LlamaForCausalLM:
    """The model with fake parameters and buffers, under FakeTensorMode."""
    model = build_meta_model(config)
    for module in model.modules():  # not to_empty, which cannot swap fake parameters
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
    model.tie()
    return model


def _prepared_model(config: Config) -> LlamaForCausalLM:
    """The same, with activations checkpointed as the configuration says."""
    model = fake_model(config)
    prepare_layers(model, config.train)
    return model


def record_layer(
    config: Config, micro_batch: int, device: DeviceType, build: Build = _prepared_model
) -> LayerRecording:
    """Records a decoder layer.

    Args:
        config: A run of one layer, whose activations are checkpointed as the configuration says of it.
        micro_batch: Sequences of a forward pass.
        device: Whose operators.
        build: Makes the model.
    """
    with _recording(config, device, build) as (model, log):
        layer = model.model.layers[0]
        _gather(layer, config)
        parameters = list(layer.named_parameters())
        _watch(log, [("layers.0", layer), *list(layer.named_modules())[1:]], parameters)
        batch = _Batch(config, micro_batch)
        seed, shared = torch.zeros((), requires_grad=True), _shared(model, batch)
        _leave_out(log, model, [seed])
        for given, component in zip(shared, SHARED, strict=True):
            if given is not None:
                log.share(given, component)
        with log:
            with _autocast(model):
                shape = (micro_batch, config.data.seq_len, config.model.hidden_size)
                x = _LayerInput.apply(seed, log, shape, model.model.embed_tokens.weight.dtype)
                log.begin_part("forward")
                y = layer(x, *shared)
                del x, shared, given
                log.hand_over(y, RESIDUAL)
                log.begin_part("leave autocast")
            log.begin_part("")
            _LayerOutput.apply(y, log).backward()
        passes = log.passes()
    return LayerRecording(
        parameters=_parameters(parameters, prefix="model.layers.0."),
        index_bytes=sum(buffer.nbytes for name, buffer in layer.named_buffers() if ".support." in name),
        forward=passes["forward"],
        leave_autocast=passes.get("leave autocast", _NOTHING).end,
        backward=passes["backward"],
        flops=log.flops,
    )


def record_ends(config: Config, micro_batch: int, device: DeviceType, build: Build = fake_model) -> EndsRecording:
    """Records embedding, last norm, head and loss. Arguments as of :func:`record_layer`."""
    with _recording(config, device, build) as (model, log):
        model.model.layers[0] = _Gap(log)
        parameters = list(model.named_parameters())
        _watch(log, model.named_modules(), parameters)
        batch = _Batch(config, micro_batch)
        _leave_out(log, model, batch.tensors())
        with log:
            log.begin_part("embedding")
            loss = model(batch.input_ids, batch.labels, batch.positions)
            log.begin_part("loss backward")
            (loss * 1.0).backward()  # as parallel/engine.py: backward_of
            log.begin_part("")
        passes = log.passes()
    return EndsRecording(
        parameters=_parameters(parameters),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        embedding=passes["embedding"],
        loss=passes["loss"],
        loss_backward=passes["loss backward"],
        embedding_backward=passes["embedding backward"],
        flops=log.flops,
    )


def record_evaluation(config: Config, micro_batch: int, device: DeviceType) -> EvaluationRecording:
    """Records a forward pass without gradients. Arguments as of :func:`record_layer`."""
    with _recording(config, device, fake_model) as (model, log):
        _gather(model.model.layers[0], config)
        model.model.layers.append(_Gap(log))
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(lambda *_: log.begin_part("layer"))
        _watch(log, model.named_modules(), [])
        batch = _Batch(config, micro_batch)
        _leave_out(log, model, batch.tensors())
        with log, torch.no_grad():
            log.begin_part("embedding")
            model(batch.input_ids, batch.labels, batch.positions)
            log.begin_part("")
        passes = log.passes()
    return EvaluationRecording(passes["embedding"], passes["layer"], passes["loss"])


def record_step(
    optim: OptimConfig, dtype: str, part: Place, device: DeviceType, int8: bool, low_bit: bool
) -> StepRecording:
    """Records an optimizer's step of one part of a parameter.

    Args:
        optim: Optimizer settings.
        dtype: Type of the parameter, as torch calls it.
        part: What is stepped of it.
        device: Whose operators.
        int8: Whether it is an int8 weight.
        low_bit: Whether int8 weights are stepped by the same optimizer, which then is another one.
    """
    with by_itself(), FakeTensorMode(), emulate(device):
        shape = (part.count // part.row, *part.shape[1:]) if part.is_matrix else (part.count,)
        kind = getattr(torch, dtype)
        value = Int8Weight.empty(shape, kind, "cpu") if int8 else torch.empty(shape, dtype=kind)
        parameter = nn.Parameter(value)
        named = [(part.name, parameter)]
        if low_bit:
            named.append(("without gradient", nn.Parameter(Int8Weight.empty((1, 1), kind, "cpu"))))
        optimizer = make_optimizer(named, optim, places={part.name: part}, agree=lambda _: None)
        parameter.grad = torch.empty(shape, dtype=kind)
        log = EventLog(device)
        log.leave_out([*parts_of(parameter).values(), parameter.grad])
        with log:
            optimizer.step()  # makes the states
            log.begin_part("step")
            optimizer.step()
    return StepRecording(transient_bytes(log, "step"))


def transient_bytes(log: EventLog, part: str) -> int:
    """Most bytes at a time in a part of what a log has seen, beside those at its start."""
    steps = log.passes().get(part, _NOTHING).steps
    return max((sum(step.peak.values()) for step in steps), default=0)


@contextmanager
def _recording(config: Config, device: DeviceType, build: Build) -> Iterator[tuple[Any, EventLog]]:
    """A model of fake tensors, and a log for it."""
    enabled = gc.isenabled()
    gc.disable()  # cycles of other code must not be freed among the events
    try:
        with by_itself(), FakeTensorMode(), operators_of(device, config):
            yield build(config), EventLog(device)
    finally:
        if enabled:
            gc.enable()


@contextmanager
def by_itself() -> Iterator[None]:
    """Makes what is recorded in the block independent of the state of torch around it."""
    enabled = torch.is_autocast_enabled("cpu")
    # Not autocast(enabled=False): within any other autocast, its cache is not cleared where training clears it.
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.set_autocast_enabled("cpu", False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(list(_ATTENTION_KERNELS)):
            yield
    finally:
        torch.set_autocast_enabled("cpu", enabled)
        for _ in range(depth):
            torch.autocast_increment_nesting()


_WHERE = {
    "embed_tokens": "embedding",
    "input_layernorm": "norm before attention",
    "self_attn": "attention",
    "post_attention_layernorm": "norm before mlp",
    "mlp": "mlp",
    "norm": "last norm",
    "lm_head": "head and loss",
}


def _watch(log: EventLog, modules: Iterable[tuple[str, nn.Module]], parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Names moments by the modules at work, and takes every gradient as it arrives."""
    ends = {"forward": "", "recomputation": ", computed again", "backward": ", backward"}
    log.watch(modules, lambda what, name: log.moment(_WHERE.get(name.rpartition(".")[2], "residual sum") + ends[what]))

    def arrives(index: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None  # autograd's promise
        log.arrives(index, gradient)

    for index, (_, parameter) in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(partial(arrives, index))


def _leave_out(log: EventLog, model: nn.Module, tensors: Iterable[Tensor | None]) -> None:
    """Leaves parameters, buffers and other tensors that exist already out of the events."""
    for parameter in model.parameters():
        log.leave_out(parts_of(parameter).values())
    log.leave_out(model.buffers())
    log.leave_out(tensor for tensor in tensors if tensor is not None)


def _gather(layer: nn.Module, config: Config) -> None:
    """Under mixed precision FSDP2 gathers what it shards in the type of matrix products."""
    if config.parallel.engine != "fsdp" or config.train.dtype != "mixed":
        return
    for name, parameter in layer.named_parameters():
        if is_sharded(f"model.layers.0.{name}", config.parallel.shard):
            parameter.data = parameter.data.to(torch.bfloat16)


def _parameters(named: list[tuple[str, nn.Parameter]], prefix: str = "") -> tuple[Parameter, ...]:
    return tuple(
        Parameter(
            name, component_of(prefix + name), tuple(p.shape), is_factor(prefix + name), isinstance(p, Int8Weight)
        )
        for name, p in named
    )


def component_of(name: str) -> Literal["factors", "sparse_values", "dense"]:
    """The component of a named parameter of the model."""
    last = name.rpartition(".")[2]
    if not is_factor(name) or last not in ("B", "A", "V"):
        return "dense"
    return "sparse_values" if last == "V" else "factors"


class _Batch:
    """A micro-batch, with its positions where documents are told apart."""

    def __init__(self, config: Config, micro_batch: int) -> None:
        shape = (micro_batch, config.data.seq_len)
        self.input_ids = torch.empty(shape, dtype=torch.int64)
        self.labels = torch.empty(shape, dtype=torch.int64)
        self.positions = torch.empty(shape, dtype=torch.int64) if config.data.reset_attention else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them."""
        return self.input_ids, self.labels, self.positions


def _autocast(model: LlamaForCausalLM) -> torch.autocast:
    return torch.autocast("cpu", model.autocast, enabled=model.autocast is not None)


def _shared(model: LlamaForCausalLM, batch: _Batch) -> tuple[Tensor | None, ...]:
    """What all layers share: cosines and sines, and the mask."""
    dtype = model.model.embed_tokens.weight.dtype
    table = model.model.rotary_emb(batch.input_ids.shape[1], dtype, batch.positions)
    if batch.positions is None:
        return (*table, None)
    return (*table, document_mask(batch.positions, model.autocast or dtype))


class _LayerInput(torch.autograd.Function):
    """Stands for the layer before: gives the input, and takes its gradient."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, log: EventLog, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.log = log
        return log.take_over(seed.new_empty(shape, dtype=dtype), RESIDUAL)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.log.hand_over(grads[0], RESIDUAL_GRADIENT)
        ctx.log.begin_part("")
        return None, None, None, None


class _LayerOutput(torch.autograd.Function):
    """Stands for the layer after: takes the output, and gives its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, log: EventLog) -> Tensor:
        ctx.log, ctx.like = log, (tuple(y.shape), y.dtype)
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shape, dtype = ctx.like
        gradient = ctx.log.take_over(grads[0].new_empty(shape, dtype=dtype), RESIDUAL_GRADIENT)
        ctx.log.begin_part("backward")
        return gradient, None


class _Gap(nn.Module):
    """Stands for all decoder layers: what it is given belongs to them, and what it gives comes from them."""

    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def forward(self, x: Tensor, *shared: Tensor | None) -> Tensor:
        """Maps the first layer's input to the last layer's output."""
        for tensor, component in zip(shared, SHARED, strict=True):
            if tensor is not None:
                self._log.hand_over(tensor, component)
        self._log.hand_over(x, RESIDUAL)
        return _ThroughLayers.apply(x, self._log)


class _ThroughLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log: EventLog) -> Tensor:
        ctx.log = log
        y = log.take_over(torch.empty_like(x), RESIDUAL)
        log.begin_part("loss")
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log = ctx.log
        log.hand_over(grads[0], RESIDUAL_GRADIENT)
        gradient = log.take_over(torch.empty_like(grads[0]), RESIDUAL_GRADIENT)
        log.begin_part("embedding backward")
        return gradient, None
