"""Whole tensors of a layer on one rank, under any engine: computed with there, and sent back. Restarts use this.

Groups of parameters that belong together, such as B and A of a layer, are dealt out to the ranks in turn. The ranks
that hold ranges of a group send them to its owner, which alone computes the new values and sends them to all. So every
rank gets the same bits, and the work is divided by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from sltrain_dist.config.schema import Config
from sltrain_dist.models.count import NamedShape, factor_pairs
from sltrain_dist.optim.restarts import clears_states
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.sparse_lowrank.balance import balanced
from sltrain_dist.sparse_lowrank.baselines import initial_A, merge

Group = Sequence[NamedShape]
"""Parameters that one rank needs whole at the same time."""

Compute = Callable[..., Sequence[Tensor]]
"""Returns the new values of a group's parameters, each of its parameter's shape, for the old ones in float32."""


def restart(engine: Engine, config: Config, env: Environment, number: int = 1) -> None:
    """Makes a restart between two updates: factors BA of every layer anew, and clears optimizer states.

    W changes by rounding only, and the values of S not at all. With relora, the products are merged instead.
    `reparam.restart_states` says which states are cleared. All ranks call this.

    Args:
        engine: The engine.
        config: The configuration, whose method has low-rank factors.
        env: The distributed environment.
        number: Number of the restart in the run, from 1, which keys relora's new values of A.
    """
    reparam = config.reparam
    scale = reparam.alpha / reparam.rank
    if reparam.method == "relora":
        _merge(engine, config, env, number)
        engine.clear_states(partial(clears_states, reparam))
        return

    def refactor(B: Tensor, A: Tensor) -> Sequence[Tensor]:
        watchdog.beat("in a restart, factoring the low-rank products anew")
        return balanced(B, A, scale)

    rewrite(engine, factor_pairs(config.model, reparam), refactor, env)
    engine.clear_states(partial(clears_states, reparam))


def _merge(engine: Engine, config: Config, env: Environment, number: int) -> None:
    """Adds the low-rank products of relora to the frozen weights, sets B to 0, and draws A anew."""
    reparam = config.reparam
    pairs = factor_pairs(config.model, reparam)

    def merge_layer(W: Tensor, B: Tensor, A: Tensor) -> Sequence[Tensor]:
        watchdog.beat("in a restart, merging the low-rank products")
        return merge(W, B, A, reparam.alpha / reparam.rank)

    groups = [
        ((name.removesuffix("B") + "weight", (m, n)), (name, (m, rank)), (A, (rank, n)))
        for (name, (m, rank)), (A, (_, n)) in pairs
    ]
    rewrite(engine, groups, merge_layer, env)
    for _, (A, (rank, n)) in pairs:
        drawn = initial_A(n, config.seed, A.removesuffix(".A"), number).read(0, rank * n)
        engine.set_values(A, drawn.to(env.device))


@torch.no_grad()
def rewrite(engine: Engine, groups: Sequence[Group], compute: Compute, env: Environment) -> None:
    """Replaces the values of groups of parameters by what one rank computes from each whole group.

    All ranks call this, with the same groups in the same order. At a time, a rank holds the group that it owns and one
    that it sends or receives, in float32.

    Args:
        engine: The engine, between two updates.
        groups: The groups; no parameter is in two of them.
        compute: Computes the new values, on the group's owner alone.
        env: The distributed environment.
    """
    engine.free_gathered()
    for first in range(0, len(groups), env.world_size):
        dealt = list(enumerate(groups[first : first + env.world_size]))
        own: Tensor | None = None
        for owner, group in dealt:
            flat = _collect(engine, group, owner, env)
            own = flat if owner == env.rank else own
            del flat  # it would be held while the owners compute
        if own is not None:  # only now, so that the ranks compute at the same time
            _replace(own, dealt[env.rank][1], compute)
        for owner, group in dealt:
            _distribute(engine, group, own if owner == env.rank else None, owner, env)


def _collect(engine: Engine, group: Group, owner: int, env: Environment) -> Tensor:
    """Returns the values of a group's parameters one after the other, flat, in float32; complete on the owner alone."""
    flat = _empty(group, env).zero_()
    for (name, _), whole in zip(group, _split(flat, group), strict=True):
        for part, values in engine.held_ranges(name):
            whole[part.start : part.stop] = values
    if env.world_size > 1:
        dist.reduce(flat, owner)  # exact: one rank has each value, and all others have 0
    return flat


def _replace(flat: Tensor, group: Group, compute: Compute) -> None:
    """Replaces the values of a group by the computed ones, in place."""
    wholes = [values.view(shape) for values, (_, shape) in zip(_split(flat, group), group, strict=True)]
    for whole, new in zip(wholes, compute(*wholes), strict=True):
        whole.copy_(new)


def _distribute(engine: Engine, group: Group, own: Tensor | None, owner: int, env: Environment) -> None:
    """Sends a group's values from its owner, which passes them as `own`, and sets what each rank holds of them."""
    flat = _empty(group, env) if own is None else own
    if env.world_size > 1:
        dist.broadcast(flat, owner)
    for (name, _), values in zip(group, _split(flat, group), strict=True):
        engine.set_values(name, values)


def _split(flat: Tensor, group: Group) -> Sequence[Tensor]:
    return flat.split([prod(shape) for _, shape in group])


def _empty(group: Group, env: Environment) -> Tensor:
    return torch.empty(sum(prod(shape) for _, shape in group), dtype=torch.float32, device=env.device)
