"""The distributed environment of this process: ranks, device, process group, and small collectives."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sltrain_dist.errors import ConfigError, SltrainError
from sltrain_dist.runtime import slurm, watchdog
from sltrain_dist.runtime.rank_variables import rank_variables

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """The place of this process among all processes of the run.

    Attributes:
        rank: 0 … world_size − 1, over all hosts.
        world_size: Number of processes.
        local_rank: Rank on this host.
        device: Device of this process.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums a few numbers over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Takes the maximum of each number over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Gathers every rank's `value` on all ranks, ordered by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _waiting():
            dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank and returns all results, ordered by rank.

        Raises:
            SltrainError: `action` failed on some rank. All ranks raise the error of the first of these, so that none
                is left waiting.
        """
        outcome: tuple[Any, SltrainError | None]
        try:
            outcome = action(), None
        except SltrainError as error:
            outcome = None, error
        outcomes = self.gather(outcome)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on the main rank and returns its result on all ranks; an error is raised on all of them."""
        if self.world_size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [action(), None]
            except SltrainError as error:
                outcome = [None, error]
        with _waiting():
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.world_size == 1:
            return [float(value) for value in values]
        with _waiting():
            tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(tensor, op)
            return tensor.tolist()  # on a GPU, this is where the process waits


@contextmanager
def _waiting() -> Iterator[None]:
    """Reports progress to the watchdog before and after a wait for the other ranks."""
    watchdog.beat("waiting for the other ranks")
    yield
    watchdog.beat("computing")


def start(timeout_s: int, *, need_group: bool) -> Environment:
    """Determines this process's ranks and device, and joins the process group.

    Under srun without another launcher, the ranks meet on the first host of the step, unless MASTER_ADDR and
    MASTER_PORT are set.

    Args:
        timeout_s: Seconds after which a collective fails.
        need_group: Whether even a single process needs a process group, as with DeepSpeed.

    Raises:
        ConfigError: The launcher's variables are invalid, a rank has no GPU, or the ranks cannot connect.
    """
    rank, world_size, local_rank = rank_variables()
    # DeepSpeed's engine follows DS_ACCELERATOR; model and engine must be on the same device.
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own (this host has {torch.cuda.device_count()}); "
                "start as many processes on each host as it has GPUs (srun: with --gpus-per-node, not --gpus-per-task, "
                "so that every task sees all of them), or set DS_ACCELERATOR=cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _share_cores(os.environ)
    if world_size > 1 or need_group:
        address = {}
        if world_size == 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        elif "SLURM_STEP_NODELIST" in os.environ:
            host = slurm.address(slurm.first_host(os.environ["SLURM_STEP_NODELIST"]))
            address = {"MASTER_ADDR": host, "MASTER_PORT": str(slurm.port(os.environ))}
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)}
        for name, value in {**address, **ranks}.items():  # DeepSpeed reads them too
            if name not in os.environ:
                os.environ[name] = value
                _ADDED_VARIABLES.add(name)
        timeout = timedelta(seconds=timeout_s)
        # DeepSpeed creates process groups without passing a timeout; these use the library's default.
        for default in ("default_pg_timeout", "default_pg_nccl_timeout"):
            setattr(distributed_c10d, default, timeout)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        except (dist.DistError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"the ranks cannot connect to {where} ({error}); if another run uses the port, choose another "
                "(deepspeed --master_port N, torchrun --master-port N, MASTER_PORT=N under srun); if the address is "
                "that of another host, check that it is up and can be reached"
            ) from None
    return Environment(rank, world_size, local_rank, device)


def meet() -> None:
    """Waits until all ranks have called this."""
    if dist.is_initialized():
        with _waiting():
            dist.barrier()


def lost_peer(error: Exception) -> str | None:
    """Explains an `error` that is caused by a rank that does not respond; returns None for other errors."""
    if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())):
        return None
    # Strip the source file at the beginning of gloo's messages, and the advice at their end.
    what = re.sub(r"^\[\S*\.cc:\d+\] ", "", str(error).splitlines()[0]).partition(". This is typically")[0]
    return (
        f"rank {os.environ.get('RANK')} on {socket.gethostname()} has lost another rank, or waited for it longer than "
        f"parallel.timeout_s ({what}); see the output of the other ranks for the cause"
    )


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in _ADDED_VARIABLES:
        os.environ.pop(name, None)
    _ADDED_VARIABLES.clear()


_ADDED_VARIABLES: set[str] = set()
"""Variables that :func:`start` has set, which later child processes must not take for a launcher's."""


def _share_cores(environ: dict[str, str] | os._Environ[str]) -> None:
    """Gives each process of this host its share of the cores, unless the user or the launcher has done so.

    By default every process starts one thread per core, which makes several processes slow each other down.
    """
    procs = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ.get("SLURM_NTASKS_PER_NODE") or "1"
    if "OMP_NUM_THREADS" not in environ and procs.isdigit() and int(procs) > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(procs)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
