"""`train.sanity_checks`: after every update, that what ought to hold under any engine does hold."""

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
    """Checks every update that has been made.

    Args:
        env: This process among all.
        supports: The supports' fingerprint, as it was when the run began.
    """

    def __init__(self, env: Environment, supports: str) -> None:
        self._env, self._supports = env, supports

    def updated(self, engine: Engine, update: Update, tracker: RunTracker) -> None:
        """See :func:`check_update`."""
        check_update(engine, self._env, step=update.step, lr=update.lr, supports=self._supports)


def check_update(engine: Engine, env: Environment, *, step: int, lr: float, supports: str) -> None:
    """Checks an update that has just been made.

    Args:
        engine: The engine.
        env: This process among all.
        step: The update's number.
        lr: What the schedule said.
        supports: The supports' fingerprint, as it was when the run began.

    Raises:
        SanityError: On all ranks, naming what does not hold and where.
    """
    problems: list[str] = []
    held = [name for name, parameter in engine.module.named_parameters() if parameter.grad is not None]
    if held:
        problems.append(f"gradients are still held after the update: {_some(held)}")
    wrong = sorted({rate for rate in engine.learning_rates() if rate != lr})
    if wrong:
        problems.append(f"the optimizer's learning rate is {wrong}, the schedule's {lr}")
    if supports_fingerprint(engine.module) != supports:
        problems.append("the supports have changed since the start")
    names, sums = [], []
    for name, tensor in engine.replicas():
        names.append(name)
        sums.append(_checksum(tensor))
    everyone = env.gather((problems, torch.stack(sums).tolist() if sums else []))
    for rank, (found, checksums) in enumerate(everyone):
        astray = [name for name, a, b in zip(names, checksums, everyone[0][1], strict=True) if a != b]
        if astray:
            found = [*found, f"its replicas differ from rank 0's: {_some(astray)}"]
        if found:
            raise SanityError(f"update {step}, rank {rank}: {'; '.join(found)}. This is a defect, not a setting")


def _checksum(tensor: Tensor) -> Tensor:
    """A sum over the bits of all values: equal for equal tensors, and changed by any one bit."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.detach().contiguous().view(width).sum(dtype=torch.int64)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
