"""Who this process is among all processes: ranks, device, process group, and small collectives."""

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
    """This process among all.

    Attributes:
        rank: 0 … world_size − 1, over all hosts.
        world_size: Processes in all.
        local_rank: Rank on this host.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums a few numbers over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """The largest of each number over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _waiting():
            dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank and returns every rank's result.

        Raises:
            SltrainError: The first rank's, on all ranks alike, if it failed on any: none is left waiting.
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
        """Runs `action` on the main rank and returns its result on all; an error is raised on all."""
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
            return tensor.tolist()  # on a GPU this is where the waiting happens


@contextmanager
def _waiting() -> Iterator[None]:
    """Progress, before and after a wait for the other ranks."""
    watchdog.beat("waiting for the other ranks")
    yield
    watchdog.beat("computing")


def start(timeout_s: int, *, need_group: bool) -> Environment:
    """Finds this process's place, picks its device, and joins the process group.

    Under srun alone the ranks meet on the step's first host, unless MASTER_ADDR and MASTER_PORT say otherwise.

    Args:
        timeout_s: Seconds after which a collective fails.
        need_group: Whether a single process needs a group too (DeepSpeed does).

    Raises:
        ConfigError: The launcher's variables, its port or the number of processes do not suit this machine.
    """
    rank, world_size, local_rank = rank_variables()
    # DeepSpeed's variable is heeded by its engine; rank, model and engine must not disagree on the device.
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} here); "
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
        for name, value in {**address, **ranks}.items():  # for DeepSpeed too
            if name not in os.environ:
                os.environ[name] = value
                _ADDED.add(name)
        timeout = timedelta(seconds=timeout_s)
        # DeepSpeed makes groups of its own without passing a timeout on; they take the library's default.
        for default in ("default_pg_timeout", "default_pg_nccl_timeout"):
            setattr(distributed_c10d, default, timeout)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        except (dist.DistError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"the ranks cannot meet at {where} ({error}); if another run has taken the port, start with another "
                "(deepspeed --master_port N, torchrun --master-port N, MASTER_PORT=N under srun); if it is another "
                "host's, see that it is up and can be reached"
            ) from None
    return Environment(rank, world_size, local_rank, device)


def meet() -> None:
    """Waits until every rank has come here."""
    if dist.is_initialized():
        with _waiting():
            dist.barrier()


def lost_peer(error: Exception) -> str | None:
    """A sentence for a person if `error` says that another rank has not answered; None if it is another error."""
    if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())):
        return None
    # Without the source file that gloo begins with, and the advice that it ends with.
    what = re.sub(r"^\[\S*\.cc:\d+\] ", "", str(error).splitlines()[0]).partition(". This is typically")[0]
    return (
        f"rank {os.environ.get('RANK')} on {socket.gethostname()} has lost another rank, or waited for it longer than "
        f"parallel.timeout_s ({what}); the other ranks' output may say why"
    )


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in _ADDED:
        os.environ.pop(name, None)
    _ADDED.clear()


_ADDED: set[str] = set()
"""Environment variables of :func:`start`: not to be taken for a launcher's by what this process starts later."""


def _share_cores(environ: dict[str, str] | os._Environ[str]) -> None:
    """Gives each process of this host its share of the cores, unless the user or the launcher has done so.

    Left alone, every process starts a thread for every core, and they slow each other down several times.
    """
    here = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ.get("SLURM_NTASKS_PER_NODE") or "1"
    if "OMP_NUM_THREADS" not in environ and here.isdigit() and int(here) > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(here)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
