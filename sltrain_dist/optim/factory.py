"""Creates optimizers from the configuration; reads and restores their states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.device import device_type
from sltrain_dist.numerics.int8_weight import Int8Weight
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.low_bit import AllReduceMax, LowBitAdam
from sltrain_dist.optim.low_bit_states import CLEARED_AT, LowBitOptimizer
from sltrain_dist.optim.matrix.jobs import WholeMatrices
from sltrain_dist.optim.matrix.optimizer import MatrixOptimizer
from sltrain_dist.optim.projected.adam import ProjectedAdam, Share, compute_all
from sltrain_dist.optim.projected.settings import projects
from sltrain_dist.optim.state_layout import (
    GROUP_KINDS,
    MASTER,
    StoredState,
    adafactor_states,
    decays,
    is_orthogonalized,
    needs_low_bit,
    stored_states,
)

Named = tuple[str, nn.Parameter]
"""A parameter and its name."""


def parameter_groups(parameters: Iterable[Named], optim: OptimConfig) -> list[dict[str, Any]]:
    """Splits named parameters into groups with and without weight decay, and those that `optim.factors` updates from
    all others. Empty groups are omitted.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {kind: [] for kind in GROUP_KINDS}
    for name, parameter in parameters:
        groups[is_orthogonalized(name, optim), decays(name, optim)].append(parameter)
    return [
        {"params": group, "weight_decay": optim.weight_decay if decay else 0.0}
        for (_, decay), group in groups.items()
        if group
    ]


def by_optimizer(parameters: Iterable[Named], optim: OptimConfig) -> list[list[Named]]:
    """Splits named parameters by the optimizer that they need: the matrices that `optim.factors` updates, those whose
    gradient is projected, and all others. Empty parts are omitted.

    The matrices of `optim.factors` are the first: their update takes more memory, and frees their gradients for the
    others'.
    """
    parts: tuple[list[Named], ...] = ([], [], [])
    for name, parameter in parameters:
        parts[0 if is_orthogonalized(name, optim) else 2 if projects(optim, name) else 1].append((name, parameter))
    return [part for part in parts if part]


def make_optimizer(
    parameters: Iterable[Named],
    optim: OptimConfig,
    *,
    ranges: Mapping[str, TensorRange] | None = None,
    all_reduce_max: AllReduceMax | None = None,
    share: Share = compute_all,
    whole_matrices: WholeMatrices | None = None,
) -> torch.optim.Optimizer:
    """Creates the optimizer of named parameters: torch's own, wherever it keeps the states in the configured form.

    Args:
        parameters: The parameters to update, all of one type, and of one part of :func:`by_optimizer`.
        optim: Optimizer settings.
        ranges: Which range of which parameter each tensor is, by name. Those not in it are whole parameters.
        all_reduce_max: See :class:`LowBitAdam`.
        share: See :class:`ProjectedAdam`.
        whole_matrices: See :class:`MatrixOptimizer`, which requires it.

    Raises:
        ValueError: An argument that the optimizer requires is missing, or some of the parameters need another one.
    """
    named = list(parameters)
    groups = parameter_groups(named, optim)
    if len(by_optimizer(named, optim)) != 1:
        raise ValueError("the parameters need several optimizers: pass one part of by_optimizer")
    if is_orthogonalized(named[0][0], optim):
        if whole_matrices is None:
            raise ValueError(f"optim.factors={optim.factors}: pass whole_matrices")
        return MatrixOptimizer(groups, optim, _ranges_by_parameter(named, ranges), whole_matrices)
    if projects(optim, named[0][0]):
        return ProjectedAdam(groups, optim, _ranges_by_parameter(named, ranges), share)
    if optim.name == "sgd":
        # Torch's own choice, but by the emulated device, if any, instead of the parameters' real one.
        return torch.optim.SGD(groups, lr=optim.lr, foreach=device_type(named[0][1]) == "cuda")
    if optim.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=optim.lr)
    if needs_low_bit(optim, named[0][1].element_size()) or any(isinstance(p, Int8Weight) for _, p in named):
        return LowBitAdam(groups, optim, _ranges_by_parameter(named, ranges), all_reduce_max)
    make = torch.optim.Adam if optim.name == "adam" else torch.optim.AdamW
    # One fused kernel per step: no parameter-sized temporaries, unlike the multi-tensor implementation.
    return make(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def _ranges_by_parameter(
    named: Iterable[tuple[str, nn.Parameter]], ranges: Mapping[str, TensorRange] | None
) -> dict[nn.Parameter, TensorRange]:
    known = ranges or {}
    return {p: known.get(name) or TensorRange.whole(name, tuple(p.shape)) for name, p in named}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Returns the learning rate of every group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def state_tensors(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns a parameter's states in memory by name, without the update counters."""
    return {key: state for key, state in optimizer.state.get(parameter, {}).items() if key not in ("step", CLEARED_AT)}


@torch.no_grad()
def clear_states(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """Sets a parameter's states in memory to what they are before its first update, in place.

    This includes the count of updates for Adam's bias correction. Master weights are kept: they are the values of the
    parameter.
    """
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and key != MASTER:
            value.zero_()
    if isinstance(optimizer, LowBitOptimizer) and state:
        state[CLEARED_AT] += state["step"]
        state["step"] = 0


@torch.no_grad()
def count_step(optimizer: torch.optim.Optimizer) -> None:
    """Counts an update that was not made, for Adam's bias correction: a resumed run derives its count from all."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] += 1


def master_weights(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor | None:
    """Returns the fp32 master weights of a parameter, flat; None if it has none (yet)."""
    masters: torch.Tensor | None = optimizer.state.get(parameter, {}).get(MASTER)
    return masters


def saved_states(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, part: TensorRange, optim: OptimConfig
) -> Iterator[tuple[StoredState, torch.Tensor]]:
    """Yields the flat state tensors that a checkpoint saves for a parameter; none before the first update."""
    states = state_tensors(optimizer, parameter)
    for stored in stored_states(part, optim, parameter.element_size()) if states else ():
        name, _, form = stored.range.name.partition(".")
        if form == "codes" and isinstance(optimizer, LowBitOptimizer):
            yield stored, optimizer.codes(parameter, name)
        else:
            yield stored, states[stored.range.name].detach().reshape(-1)[stored.skip :]


def adopt_state(
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    states: Mapping[str, torch.Tensor],
    step: int,
    cleared_at: int = 0,
) -> None:
    """Sets the optimizer states of `parameter` to those of a checkpoint made after `step` updates.

    Args:
        optimizer: The optimizer of the parameter.
        parameter: The parameter that the states belong to.
        states: Flat tensors of any floating type, by the names that :func:`stored_states` gives them; empty if no
            update was made.
        step: Number of updates made.
        cleared_at: Number of the update after which :func:`clear_states` was last called; 0: never.
    """
    if not states:
        return
    device = parameter.device
    if isinstance(optimizer, LowBitOptimizer):
        state = optimizer.state[parameter] = optimizer.make_state(parameter)
        state["step"], state[CLEARED_AT] = step - cleared_at, cleared_at
        for key, values in states.items():
            name, _, form = key.partition(".")
            if form == "codes":
                optimizer.set_codes(parameter, name, values.to(device))
            else:
                state[key].copy_(values)
        return
    shapes = _adafactor_shapes(parameter) if isinstance(optimizer, torch.optim.Adafactor) else {}
    step_device = "cpu" if isinstance(optimizer, torch.optim.Adafactor) else device
    optimizer.state[parameter] = {
        "step": torch.tensor(float(step - cleared_at), dtype=torch.float32, device=step_device),
        **{key: values.to(parameter).view(shapes.get(key, parameter.shape)) for key, values in states.items()},
    }


def _adafactor_shapes(parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
    return {
        stored.range.name: stored.range.shape
        for stored in adafactor_states(TensorRange.whole("", tuple(parameter.shape)), 0)
    }
