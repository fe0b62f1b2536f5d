"""Runs worker modules on several ranks of this machine.

The ranks are forks of one process that has imported torch and DeepSpeed, so that the imports are paid for once:

    python -m tests.distributed.launch MODULE RANKS[,RANKS…] ARGUMENT…

calls MODULE.main(ARGUMENT…) on every rank; with several numbers of ranks, on one group of ranks after the other.
"""

from __future__ import annotations

import importlib
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
    command = [sys.executable, "-m", "tests.distributed.launch", module.__name__, ",".join(map(str, ranks))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]


def _rank(rank: int, module: ModuleType, ranks: int, port: int, arguments: tuple[str, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    module.main(*arguments)


def _main(name: str, numbers: str, *arguments: str) -> None:
    module = importlib.import_module(name)
    importlib.import_module("deepspeed")
    for ranks in map(int, numbers.split(",")):
        torch.multiprocessing.start_processes(
            _rank, (module, ranks, free_port(), arguments), ranks, start_method="fork"
        )


if __name__ == "__main__":
    _main(*sys.argv[1:])
