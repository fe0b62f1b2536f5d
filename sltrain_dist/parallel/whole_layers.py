"""Whole tensors of a layer on one rank, under any engine: computed with there, and sent back. Restarts use this, and
the optimizers of `optim.factors`.

Jobs that need tensors that belong together, such as B and A of a layer, are dealt out to the ranks in turn. The ranks
that hold ranges of the tensors send them to the job's owner, which alone computes with them and sends the results to
all. So every rank gets the same bits, and the work is divided by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain_dist.config.schema import Config
from sltrain_dist.models.count import NamedShape, factor_pairs
from sltrain_dist.optim.matrix.jobs import MatrixJob, WholeMatrices
from sltrain_dist.optim.restarts import clears_states
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.sparse_lowrank.balance import balanced
from sltrain_dist.sparse_lowrank.baselines import initial_A, merge
from sltrain_dist.sparse_lowrank.layer import LowRankLinear, SLLinear

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

    All ranks call this, with the same groups in the same order.

    Args:
        engine: The engine, between two updates.
        groups: The groups; no parameter is in two of them.
        compute: Computes the new values, on the group's owner alone.
        env: The distributed environment.
    """

    def collect(group: Group, flat: Sequence[Tensor]) -> None:
        for (name, _), whole in zip(group, flat, strict=True):
            for part, values in engine.held_ranges(name):
                whole[part.start : part.stop] = values

    def replace(wholes: Sequence[Tensor]) -> None:
        for whole, new in zip(wholes, compute(*wholes), strict=True):
            whole.copy_(new)

    def distribute(group: Group, flat: Sequence[Tensor]) -> None:
        for (name, _), values in zip(group, flat, strict=True):
            engine.set_values(name, values)

    engine.free_gathered()
    jobs = [
        MatrixJob(
            tuple(shape for _, shape in group), len(group), partial(collect, group), replace, partial(distribute, group)
        )
        for group in groups
    ]
    deal(jobs, env)


def whole_matrices(model: nn.Module, env: Environment, *, copies: int) -> WholeMatrices:
    """Returns how an optimizer of this engine's ranks reaches whole matrices.

    Args:
        model: The model.
        env: The distributed environment.
        copies: See :func:`deal`.
    """
    layers = (module for module in model.modules() if isinstance(module, SLLinear | LowRankLinear))
    scale = next((layer.alpha / layer.rank for layer in layers), 1.0)  # the same in all layers
    return WholeMatrices(partial(deal, env=env, copies=copies), scale)


def deal(jobs: Sequence[MatrixJob], env: Environment, *, copies: int = 1) -> None:
    """Makes jobs, each on one rank.

    All ranks call this, with the same jobs in the same order. At a time, a rank holds the tensors of the job that it
    owns and of one that it sends or receives, in float32.

    Args:
        jobs: The jobs.
        env: The distributed environment.
        copies: Number of groups of ranks that each collect all values. With as many as ranks, nothing needs to be sent
            to a job's owner.
    """
    ranks = env.world_size
    for first in range(0, len(jobs), ranks):
        dealt = list(enumerate(jobs[first : first + ranks]))
        own: Tensor | None = None
        for owner, job in dealt:
            flat = _collect(job, owner, env, copies)
            own = flat if owner == env.rank else own
            del flat  # it would be held while the owners compute
        if own is not None:  # only now, so that the ranks compute at the same time
            job = dealt[env.rank][1]
            job.compute([values.view(shape) for values, shape in zip(_split(own, job.shapes), job.shapes, strict=True)])
        for owner, job in dealt:
            _deliver(job, own if owner == env.rank else None, owner, env)


def _collect(job: MatrixJob, owner: int, env: Environment, copies: int) -> Tensor:
    """Returns the tensors of a job one after the other, flat, in float32; complete on the owner alone."""
    flat = _empty(job.shapes, env).zero_()
    job.collect(_split(flat, job.shapes))
    if env.world_size > copies:
        if env.rank >= env.world_size // copies:
            flat.zero_()  # a rank of the first group has the same values
        dist.reduce(flat, owner)  # exact: one rank has each value, and all others have 0
    return flat


def _deliver(job: MatrixJob, own: Tensor | None, owner: int, env: Environment) -> None:
    """Sends a job's results from its owner, which passes its tensors as `own`, and uses them."""
    shapes = job.shapes[: job.outputs]
    results = _empty(shapes, env) if own is None else own[: _values(shapes)]
    if env.world_size > 1:
        dist.broadcast(results, owner)
    job.deliver(_split(results, shapes))


def _split(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> Sequence[Tensor]:
    return flat.split([prod(shape) for shape in shapes])


def _values(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes)


def _empty(shapes: Sequence[tuple[int, ...]], env: Environment) -> Tensor:
    return torch.empty(_values(shapes), dtype=torch.float32, device=env.device)
