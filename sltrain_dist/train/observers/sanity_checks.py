"""`train.sanity_checks`: checks after every update of what must be true with any engine."""

from __future__ import annotations

import torch
from torch import Tensor

from sltrain_dist.errors import SanityError
from sltrain_dist.models.build import supports_fingerprint
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.tracking.tracker import RunTracker
from sltrain_dist.train.observers.observer import Observer, Update


class SanityChecks(Observer):
    """An observer that checks every update.

    Args:
        env: The distributed environment.
        supports: Fingerprint of the supports at the start of the run.
    """

    def __init__(self, env: Environment, supports: str) -> None:
        self._env, self._supports = env, supports

    def updated(self, engine: Engine, update: Update, tracker: RunTracker) -> None:
        """See :func:`check_update`."""
        check_update(engine, self._env, step=update.step, lr=update.lr, supports=self._supports)


def check_update(engine: Engine, env: Environment, *, step: int, lr: float, supports: str) -> None:
    """Checks that replicas are in sync, gradients freed, the learning rate as scheduled, and supports unchanged.

    Args:
        engine: The engine.
        env: The distributed environment.
        step: Number of the update.
        lr: Learning rate of the schedule.
        supports: Fingerprint of the supports at the start of the run.

    Raises:
        SanityError: A check failed on some rank. Raised on all ranks, with the failed checks and that rank.
    """
    problems: list[str] = []
    not_freed = [name for name, parameter in engine.module.named_parameters() if parameter.grad is not None]
    if not_freed:
        problems.append(f"gradients are not freed after the update: {_some(not_freed)}")
    wrong = sorted({rate for rate in engine.learning_rates() if rate != lr})
    if wrong:
        problems.append(f"the optimizer's learning rate is {wrong}, but the schedule's is {lr}")
    if supports_fingerprint(engine.module) != supports:
        problems.append("the supports have changed since the start")
    names, sums = [], []
    for name, tensor in engine.replicas():
        names.append(name)
        sums.append(_checksum(tensor))
    everyone = env.gather((problems, torch.stack(sums).tolist() if sums else []))
    for rank, (found, checksums) in enumerate(everyone):
        out_of_sync = [name for name, a, b in zip(names, checksums, everyone[0][1], strict=True) if a != b]
        if out_of_sync:
            found = [*found, f"its replicas differ from rank 0's: {_some(out_of_sync)}"]
        if found:
            raise SanityError(f"update {step}, rank {rank}: {'; '.join(found)}. This is a bug, not a wrong setting")


def _checksum(tensor: Tensor) -> Tensor:
    """Returns a sum over the bits of all values, which changes if any single bit changes."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.detach().contiguous().view(width).sum(dtype=torch.int64)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
