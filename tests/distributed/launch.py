"""Runs worker modules on several ranks of this machine.

The ranks are forks of one process that has imported torch and DeepSpeed, so that the imports are paid for once:

    python -m tests.distributed.launch MODULE RANKS[,RANKS…] '[[ARGUMENT, …], …]'

calls MODULE.main(ARGUMENT, …) on every rank; with several numbers of ranks or lists of arguments, on one group of ranks
after the other.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType

import torch.multiprocessing

from tests.support.paths import REPO
from tests.support.runs import free_port


def launch(module: ModuleType, *arguments: object, ranks: Sequence[int], timeout_s: float = 900) -> None:
    """Runs a module's `main` on these numbers of ranks, and returns when all have ended without an error."""
    launch_each(module, [arguments], ranks=ranks, timeout_s=timeout_s)


def launch_each(
    module: ModuleType, arguments: Sequence[Sequence[object]], *, ranks: Sequence[int], timeout_s: float = 900
) -> None:
    """Does the same as :func:`launch`, once with each of several lists of arguments."""
    lists = json.dumps([[str(argument) for argument in each] for each in arguments])
    command = [sys.executable, "-m", "tests.distributed.launch", module.__name__, ",".join(map(str, ranks)), lists]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        command,
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]


def _rank(rank: int, module: ModuleType, ranks: int, port: int, arguments: Sequence[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    module.main(*arguments)


def _main(name: str, numbers: str, lists: str) -> None:
    module = importlib.import_module(name)
    importlib.import_module("deepspeed")
    for arguments, ranks in itertools.product(json.loads(lists), map(int, numbers.split(","))):
        torch.multiprocessing.start_processes(
            _rank, (module, ranks, free_port(), arguments), ranks, start_method="fork"
        )


if __name__ == "__main__":
    _main(*sys.argv[1:])
