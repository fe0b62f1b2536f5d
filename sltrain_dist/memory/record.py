"""Recordings of the training code: its modules and optimizers run on fake tensors, which have shapes and no memory.

A decoder layer is recorded alone, with a given input and a given gradient of its output. The embedding, the last norm,
the head and the loss are recorded with a stand-in for the layers. The recordings serve models of any depth.
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

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.events import EventLog
from sltrain_dist.memory.operators import operators_of
from sltrain_dist.memory.recording import Parameter, Recording
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.models.count import is_factor
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.numerics.device import DeviceType, emulate
from sltrain_dist.numerics.int8_weight import Int8Weight, parts_of
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.factory import make_optimizer
from sltrain_dist.parallel.checkpointing import prepare_layers
from sltrain_dist.parallel.placement import Shard, is_sharded
from sltrain_dist.sparse_lowrank.balance import balanced
from sltrain_dist.sparse_lowrank.baselines import merge

RESIDUAL, RESIDUAL_GRADIENT = "activations.residual", "temporaries.residual"
"""Components of the residual stream between layers, and of its gradient."""
SHARED = ("activations.rotary", "activations.rotary", "activations.mask")
"""Components of the inputs that all layers share: cosines, sines and the mask."""
_ATTENTION_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

Build = Callable[[Config], Any]
"""A function that builds a model of fake tensors whose modules have the names and calls of `LlamaForCausalLM`."""


def fake_model(config: Config) -> LlamaForCausalLM:
    """Builds the model with fake parameters and buffers; needs FakeTensorMode."""
    model = build_meta_model(config)
    for module in model.modules():  # to_empty cannot swap fake parameters
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty_like(parameter, device="cpu")
            module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
    model.tie()
    return model


def _prepared_model(config: Config) -> LlamaForCausalLM:
    """Builds the same model, with activation checkpointing as configured."""
    model = fake_model(config)
    prepare_layers(model, config.train)
    return model


def record_layer(
    config: Config, gathered: Shard | None, device: DeviceType, build: Build = _prepared_model
) -> Recording:
    """Records a decoder layer.

    Args:
        config: Configuration of a model with one layer, and with activation checkpointing of this layer.
        gathered: Which parameters are gathered in the type of matrix products.
        device: Device whose operators are recorded.
        build: Builds the model.
    """
    with _recording(config, device, build) as (model, log):
        layer = model.model.layers[0]
        _gather(layer, gathered)
        parameters = list(layer.named_parameters())
        like = {"size": (*_batch(config)[0].shape, config.model.hidden_size), "dtype": model.model.norm.weight.dtype}

        def forward_begins(_: nn.Module, inputs: tuple[Tensor | None, ...]) -> None:
            for tensor, component in zip(inputs[1:], SHARED, strict=True):
                if tensor is not None:
                    log.share(tensor, component)
            log.begin_part("forward")

        layer.register_forward_pre_hook(forward_begins)
        _watch(log, [("layers.0", layer), *list(layer.named_modules())[1:]], parameters)

        def forward_ends(y: Tensor) -> Tensor:
            log.hand_over(y, RESIDUAL)
            log.begin_part("")
            loss = y.new_empty(())  # a stand-in
            log.begin_part("leave autocast")
            return loss

        def backward_begins(_: Tensor) -> Tensor:
            gradient = log.take_over(torch.empty(**like), RESIDUAL_GRADIENT)
            log.begin_part("backward")
            return gradient

        def backward_ends(gradient: Tensor) -> None:
            log.hand_over(gradient, RESIDUAL_GRADIENT)
            log.begin_part("")

        model.model.embed_tokens = _StandIn(lambda _: log.take_over(torch.empty(**like), RESIDUAL), backward_ends)
        model.model.norm = _StandIn(forward_ends, backward_begins)
        input_ids, _, *positions = _batch(config)
        _leave_out(log, model, [input_ids, *positions])
        with log:
            with torch.autocast("cpu", model.autocast, enabled=model.autocast is not None):
                loss = model.model(input_ids, *positions)
            log.begin_part("")
            loss.backward()
    indices = sum(buffer.nbytes for name, buffer in layer.named_buffers() if ".support." in name)
    return Recording(log.passes(), _parameters(parameters, "model.layers.0."), log.flops, {"buffers": indices})


def record_ends(config: Config, device: DeviceType, build: Build = fake_model) -> Recording:
    """Records embedding, last norm, head and loss. Takes the arguments of :func:`record_layer`."""
    with _recording(config, device, build) as (model, log):
        model.model.layers[0] = _stand_in_for_layers(log)
        parameters = [(name, parameter) for name, parameter in model.named_parameters() if ".layers." not in name]
        _watch(log, model.named_modules(), parameters)
        batch = _batch(config)
        _leave_out(log, model, batch)
        with log:
            log.begin_part("embedding")
            loss = model(*batch)
            log.begin_part("loss backward")
            (loss * 1.0).backward()  # as parallel/engine.py: backward_of
            log.begin_part("")
    tables = sum(buffer.nbytes for buffer in model.buffers())
    return Recording(log.passes(), _parameters(parameters), log.flops, {"buffers": tables})


def record_evaluation(config: Config, gathered: Shard | None, device: DeviceType) -> Recording:
    """Records a forward pass of an evaluation. Takes the arguments of :func:`record_layer`."""
    with _recording(config, device, fake_model) as (model, log):
        layer = model.model.layers[0]
        _gather(layer, gathered)
        model.model.layers.append(_stand_in_for_layers(log))
        layer.register_forward_pre_hook(lambda *_: log.begin_part("layer"))
        _watch(log, model.named_modules(), [])
        batch = _batch(config)
        _leave_out(log, model, batch)
        with log, torch.no_grad():
            log.begin_part("embedding")
            model(*batch)
            log.begin_part("")
    return Recording(log.passes())


def record_step(
    config: Config, dtype: str, part: TensorRange, int8: bool, low_bit: bool, device: DeviceType
) -> Recording:
    """Records the optimizer step of one part of a parameter.

    Args:
        config: Configuration with the optimizer's settings.
        dtype: Type of the parameter, by its name in torch.
        part: Part of the parameter that is stepped.
        int8: Whether the parameter is an int8 weight.
        low_bit: Whether the same optimizer also steps int8 weights, which makes it a LowBitAdam.
        device: Device whose operators are recorded.
    """
    with by_itself(), FakeTensorMode(), emulate(device):
        shape = (part.count // part.row, *part.shape[1:]) if part.is_matrix else (part.count,)
        kind = getattr(torch, dtype)
        value = Int8Weight.empty(shape, kind, "cpu") if int8 else torch.empty(shape, dtype=kind)
        parameter = nn.Parameter(value)
        named = [(part.name, parameter)]
        if low_bit:
            named.append(("without gradient", nn.Parameter(Int8Weight.empty((1, 1), kind, "cpu"))))
        optimizer = make_optimizer(named, config.optim, ranges={part.name: part}, all_reduce_max=lambda _: None)
        parameter.grad = torch.empty(shape, dtype=kind)
        log = EventLog(device)
        log.leave_out([*parts_of(parameter).values(), parameter.grad])
        with log:
            optimizer.step()  # makes the states
            log.begin_part("step")
            optimizer.step()
    return Recording(sizes={"step": transient_bytes(log, "step")})


def record_restart(config: Config, m: int, n: int, rank: int, device: DeviceType) -> Recording:
    """Records the new factorization of the low-rank product of an (m, n) layer, or its merge, as a restart makes it.

    Args:
        config: Configuration with the method: relora merges.
        m: Rows of B.
        n: Columns of A.
        rank: r.
        device: Device whose operators are recorded.
    """
    with by_itself(), FakeTensorMode(), emulate(device):
        factors, weight = (torch.empty(m, rank), torch.empty(rank, n)), torch.empty(m, n)
        merges, log = config.reparam.method == "relora", EventLog(device)
        group = (weight, *factors) if merges else factors
        log.leave_out(group)
        with log:
            log.begin_part("restart")
            if merges:
                merge(weight, *factors, 1.0)
            else:
                balanced(*factors, 1.0)
    held = sum(each.nbytes for each in group)  # on the layer's owner, in float32
    return Recording(flops=log.flops, sizes={"restart": held + transient_bytes(log, "restart")})


def transient_bytes(log: EventLog, part: str) -> int:
    """Returns the largest number of bytes in a part of a log, beyond those live at the part's start."""
    passes = log.passes()
    return max((sum(step.peak.values()) for step in passes[part].steps), default=0) if part in passes else 0


@contextmanager
def _recording(config: Config, device: DeviceType, build: Build) -> Iterator[tuple[Any, EventLog]]:
    """Yields a model of fake tensors and a log, under FakeTensorMode and with a device's operators."""
    enabled = gc.isenabled()
    gc.disable()  # so that garbage of other code is not freed during the recording
    try:
        with by_itself(), FakeTensorMode(), operators_of(device, config):
            yield build(config), EventLog(device)
    finally:
        if enabled:
            gc.enable()


@contextmanager
def by_itself() -> Iterator[None]:
    """Isolates a recording from torch's global state: autocast, gradient mode and attention kernels."""
    enabled = torch.is_autocast_enabled("cpu")
    # autocast(enabled=False) would not do: inside it, autocast's cache is not cleared where training clears it.
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


_MOMENT_NAMES = {
    "embed_tokens": "embedding",
    "input_layernorm": "norm before attention",
    "self_attn": "attention",
    "post_attention_layernorm": "norm before mlp",
    "mlp": "mlp",
    "norm": "last norm",
    "lm_head": "head and loss",
}


def _watch(log: EventLog, modules: Iterable[tuple[str, nn.Module]], parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Names moments by the running module, and logs and removes every gradient as it arrives."""
    suffixes = {"forward": "", "recomputation": ", recomputed", "backward": ", backward"}

    def begins(what: Literal["forward", "recomputation", "backward"], name: str) -> None:
        log.moment(_MOMENT_NAMES.get(name.rpartition(".")[2], "residual sum") + suffixes[what])

    log.watch(modules, begins)

    def arrives(index: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None  # autograd's promise
        log.arrives(index, gradient)

    for index, (_, parameter) in enumerate(parameters):
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(arrives, index))


def _leave_out(log: EventLog, model: nn.Module, tensors: Iterable[Tensor | None]) -> None:
    """Leaves parameters, buffers and other existing tensors out of the log."""
    for parameter in model.parameters():
        log.leave_out(parts_of(parameter).values())
    log.leave_out(model.buffers())
    log.leave_out(tensor for tensor in tensors if tensor is not None)


def _gather(layer: nn.Module, gathered: Shard | None) -> None:
    """Casts the sharded parameters to bf16, in which FSDP2 gathers them under mixed precision."""
    for name, parameter in layer.named_parameters():
        if gathered is not None and is_sharded(f"model.layers.0.{name}", gathered):
            parameter.data = parameter.data.to(torch.bfloat16)


def _parameters(named: list[tuple[str, nn.Parameter]], prefix: str = "") -> tuple[Parameter, ...]:
    return tuple(
        Parameter(
            name,
            component_of(prefix + name),
            tuple(p.shape),
            is_factor(prefix + name),
            isinstance(p, Int8Weight),
            not p.requires_grad,
        )
        for name, p in named
    )


def component_of(name: str) -> Literal["factors", "sparse_values", "dense"]:
    """Returns the component of a parameter of the model by its name."""
    last = name.rpartition(".")[2]
    if not is_factor(name) or last not in ("B", "A", "V"):
        return "dense"
    return "sparse_values" if last == "V" else "factors"


def _batch(config: Config) -> list[Tensor]:
    """Returns token ids and labels of a micro-batch, and positions if attention is reset between documents."""
    shape = (config.train.micro_batch, config.data.seq_len)
    return [torch.empty(shape, dtype=torch.int64) for _ in range(3 if config.data.reset_attention else 2)]


class _StandIn(nn.Module):
    """A stand-in for modules that are not recorded.

    Args:
        forward: Returns the output for the module's inputs.
        backward: Returns the gradient of the first input for the gradient of the output.
    """

    def __init__(self, forward: Callable[..., Tensor], backward: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self._run_forward, self._run_backward = forward, backward
        self._seed = nn.Parameter(torch.empty(()))  # so that the output requires a gradient, whatever the input is

    def forward(self, *inputs: Tensor | None) -> Tensor:
        out: Tensor = _StandInFunction.apply(self._run_forward, self._run_backward, self._seed, *inputs)
        return out


class _StandInFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run_forward: Any, run_backward: Any, seed: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.run_backward, ctx.others = run_backward, (None,) * (len(inputs) - 1)
        out: Tensor = run_forward(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, ctx.run_backward(grads[0]), *ctx.others


def _stand_in_for_layers(log: EventLog) -> _StandIn:
    """Returns a stand-in for the decoder layers, which hands its inputs over to them and takes over their outputs."""

    def forward(x: Tensor, *shared: Tensor | None) -> Tensor:
        for tensor, component in zip((x, *shared), (RESIDUAL, *SHARED), strict=True):
            if tensor is not None:
                log.hand_over(tensor, component)
        y = log.take_over(torch.empty_like(x), RESIDUAL)
        log.begin_part("loss")
        return y

    def backward(gradient: Tensor) -> Tensor:
        log.hand_over(gradient, RESIDUAL_GRADIENT)
        input_gradient = log.take_over(torch.empty_like(gradient), RESIDUAL_GRADIENT)
        log.begin_part("embedding backward")
        return input_gradient

    return _StandIn(forward, backward)
