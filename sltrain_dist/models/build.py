"""Builds a model from the configuration, first on the meta device, and initialises it in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sltrain_dist.config.schema import PROJECTED_METHODS, Config, Method, ReparamConfig
from sltrain_dist.models.count import is_int8
from sltrain_dist.models.llama import DenseLinear, LinearFactory, LlamaForCausalLM
from sltrain_dist.numerics.int8_weight import Int8Weight
from sltrain_dist.numerics.keyed import Initial
from sltrain_dist.sparse_lowrank.baselines import ColaLinear, ReloraLinear
from sltrain_dist.sparse_lowrank.layer import LowRankLinear, SLLinear


def build_model(config: Config, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """Builds the whole model on `device`, with initial values that depend only on (seed, parameter name).

    The model is built on the meta device and then filled in place, parameter by parameter, so that no dense copy of a
    replaced weight ever exists. With device "meta", nothing is allocated or initialised.
    """
    model = build_meta_model(config)
    if torch.device(device).type != "meta":
        materialise(model, partial(torch.empty_like, device=device))
        initialise(model)
    return model


def build_meta_model(config: Config) -> LlamaForCausalLM:
    """Builds the model on the meta device, with parameters of the type that `train.dtype` sets."""
    with torch.device("meta"):
        factories = [
            linear_factory(config.reparam.method_of(layer, config.model.num_layers), config)
            for layer in range(config.model.num_layers)
        ]
        precision = config.train.precision
        autocast = getattr(torch, precision.product) if precision.is_mixed else None
        chunk_tokens = config.train.chunk_tokens(config.model.vocab_size)
        model = LlamaForCausalLM(config.model, factories, config.data.seq_len, config.seed, autocast, chunk_tokens)
    dtype = getattr(torch, precision.parameter)
    for parameter in model.parameters():  # not model.to(dtype): the rotary table stays in float32
        parameter.data = parameter.data.to(dtype)
    _quantize(model, config.reparam)
    return model


def _quantize(model: LlamaForCausalLM, reparam: ReparamConfig) -> None:
    """Replaces parameters by int8 weights, still on the meta device, where the configuration says so."""
    for name, parameter in list(model.named_parameters()):
        if is_int8(name, reparam):
            module, _, key = name.rpartition(".")
            weight = Int8Weight.empty(tuple(parameter.shape), parameter.dtype, parameter.device)
            model.get_submodule(module).register_parameter(key, nn.Parameter(weight))


def materialise(model: LlamaForCausalLM, make: Callable[[Tensor], Tensor]) -> None:
    """Allocates the tensors of a model on the meta device and computes its buffers; leaves any other model as it is.

    Args:
        model: The model.
        make: Returns an uninitialised tensor to replace a meta tensor, as `torch.empty_like` does. A meta tensor that
            it returns unchanged stays on the meta device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        give_memory(model, make)
        model.tie()
        model.model.rotary_emb.reset_parameters()  # supports compute their own buffers


def give_memory(module: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replaces a module's meta tensors by the tensors that `make` returns, in the way of `to_empty`."""
    module._apply(lambda tensor: make(tensor) if tensor.is_meta else tensor)


def initialise(model: nn.Module) -> None:
    """Sets all parameters of a materialised model to their initial values, in place."""
    initials = _initials(model)
    for name, parameter in model.named_parameters():
        initials[name].fill_(parameter)


def initial_values(model: nn.Module) -> Callable[[str, int, int], Tensor]:
    """Returns a function that reads initial values like a checkpoint's: (name, start, count) of "model.<parameter>" to
    float32 values on the CPU.

    Args:
        model: The model, possibly on the meta device or sharded; without int8 weights.
    """
    initials = {f"model.{name}": initial for name, initial in _initials(model).items()}
    return lambda name, start, count: initials[name].read(start, count)


def _initials(model: nn.Module) -> dict[str, Initial]:
    """Returns how each parameter is initialised, by its name."""
    return {
        f"{prefix}.{name}": initial
        for prefix, module in model.named_modules()
        if hasattr(module, "initial_values")
        for name, initial in module.initial_values().items()
    }


def linear_factory(method: Method, config: Config) -> LinearFactory:
    """Returns the function that creates the linear layers of attention and MLP in a decoder layer of this method."""
    reparam, seed = config.reparam, config.seed

    def make(in_features: int, out_features: int, name: str) -> nn.Module:
        if method == "full" or method in PROJECTED_METHODS:
            return DenseLinear(in_features, out_features, name=name, seed=seed, std=config.model.init_std)
        if method == "cola":
            return ColaLinear(in_features, out_features, reparam.rank, name=name, seed=seed)
        if method == "relora":
            rank, alpha, std = reparam.rank, reparam.alpha, config.model.init_std
            return ReloraLinear(in_features, out_features, rank, alpha, std=std, name=name, seed=seed)
        if method == "lowrank":
            return LowRankLinear(in_features, out_features, reparam.rank, reparam.alpha, name=name, seed=seed)
        return SLLinear(
            in_features,
            out_features,
            reparam.rank,
            reparam.density,
            reparam.alpha,
            support=reparam.support,
            path=reparam.path,
            row_block_bytes=reparam.row_block_bytes,
            name=name,
            seed=config.support_seed,
        )

    return make


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SLLinear]]:
    """Yields (construction name, layer) of every sparse plus low-rank layer."""
    for module in model.modules():
        if isinstance(module, SLLinear):
            yield module.name, module


def supports_fingerprint(model: nn.Module) -> str:
    """Returns 16 hex digits that identify all supports, by layer name; equal on every rank and in every resumed run."""
    return join_fingerprints((name, layer.support.fingerprint()) for name, layer in sparse_layers(model))


def join_fingerprints(supports: Iterable[tuple[str, str]]) -> str:
    """Returns 16 hex digits that identify (layer name, fingerprint) of all supports, in the order of the layers."""
    lines = "".join(f"{name}:{fingerprint}\n" for name, fingerprint in supports)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
