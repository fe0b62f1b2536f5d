"""When restarts are made (`reparam.restart_every`), and what the learning rate is after them (no torch).

These are pure functions of the number of updates made. So nothing about restarts is saved, and a run that resumes makes
the same restarts as one that was not interrupted.
"""

from __future__ import annotations

from sltrain_dist.config.schema import ReparamConfig

LOWEST_SHARE = 0.001
"""Share of the schedule's learning rate in the first update after a restart."""


def restart_is_due(reparam: ReparamConfig, step: int) -> bool:
    """Returns whether a restart is made between update number `step` and the next one."""
    return reparam.restart_every > 0 and step > 0 and step % reparam.restart_every == 0


def last_restart(reparam: ReparamConfig, step: int) -> int:
    """Returns the number of the update after which the last restart was made when `step` updates are made; 0: none.

    A restart that is due after update `step` itself has not been made yet: it belongs to the beginning of the next
    update, and a checkpoint of `step` has the factors and states from before it.
    """
    if reparam.restart_every == 0 or step == 0:
        return 0
    return (step - 1) // reparam.restart_every * reparam.restart_every


def learning_rate_share(reparam: ReparamConfig, step: int) -> float:
    """Returns the share of the schedule's learning rate that the update after `step` updates uses.

    The first update after a restart uses :data:`LOWEST_SHARE`. The share rises linearly, and is 1 again
    `restart_warmup` updates later.
    """
    restart = last_restart(reparam, step + 1)
    since = step - restart
    if restart == 0 or since >= reparam.restart_warmup:
        return 1.0
    return LOWEST_SHARE + (1.0 - LOWEST_SHARE) * since / reparam.restart_warmup


def clears_states(reparam: ReparamConfig, name: str) -> bool:
    """Returns whether a restart clears the optimizer states of a named parameter."""
    return reparam.restart_states == "all" or name.endswith((".B", ".A"))


def states_cleared_at(reparam: ReparamConfig, name: str, step: int) -> int:
    """Returns the number of the update after which a parameter's states were last cleared, as of update `step`."""
    return last_restart(reparam, step) if clears_states(reparam, name) else 0
