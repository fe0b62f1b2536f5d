"""The ranks of this process, from the environment variables that launchers set (no torch)."""

from __future__ import annotations

import os

from sltrain_dist.errors import ConfigError


def rank_variables(environ: dict[str, str] | os._Environ[str] = os.environ) -> tuple[int, int, int]:
    """Returns (rank, world_size, local_rank) from a launcher's variables, or (0, 1, 0) without a launcher.

    Raises:
        ConfigError: The variables are not numbers, or contradict each other.
    """
    try:
        if "RANK" in environ and "WORLD_SIZE" in environ:  # torchrun, deepspeed
            rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
            local_rank = int(environ.get("LOCAL_RANK", 0))
        elif int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun; the batch script itself is not a step
            rank, world_size = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"])
            local_rank = int(environ.get("SLURM_LOCALID", 0))
        else:
            rank, world_size, local_rank = 0, 1, 0
    except ValueError as error:
        raise ConfigError(f"the launcher's rank variables are not numbers: {error}") from None
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK = {rank} is outside 0 … WORLD_SIZE − 1 = {world_size - 1}")
    return rank, world_size, local_rank
