"""A whole training run on every rank: what torchrun would start, without the seconds that its imports take."""

from __future__ import annotations

import sltrain_dist.train.build  # noqa: F401  what a run imports later: before the ranks are forked
from sltrain_dist.train.run import pretrain


def main(config: str, run_dir: str, *overrides: str) -> None:
    """Trains; the process exits with the run's code, which :func:`tests.distributed.launch.launch` asserts to be 0."""
    pretrain(config, [f"run_dir={run_dir}", *overrides])
