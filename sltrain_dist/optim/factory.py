"""Makes torch's optimizers from the configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.optim.state_layout import decays


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> list[dict[str, Any]]:
    """Splits named parameters by weight decay. Empty groups are left out."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        (decay if decays(name, optim) else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Makes the optimizer over named parameters. States are of the parameters' type."""
    groups = parameter_groups(parameters, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    betas = (optim.beta1, optim.beta2)
    # One fused kernel per step: no parameter-sized temporaries, unlike the multi-tensor implementation.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of every group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def adopt_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, states: dict[str, torch.Tensor], step: int
) -> None:
    """Gives `parameter` the optimizer states of a checkpoint after `step` updates."""
    if states:
        count = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": count, **states}
