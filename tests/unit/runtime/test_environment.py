"""Ranks from launchers' variables, and threads per process."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from sltrain_dist.errors import ConfigError, DataError
from sltrain_dist.runtime import environment
from sltrain_dist.runtime.environment import Environment, rank_variables


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
        # the batch script of a job of four tasks is not one of them
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        # torchrun inside a SLURM job: the nearer launcher counts
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
            (1, 2, 1),
        ),
    ],
)
def test_rank_variables(variables: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert rank_variables(variables) == expected


@pytest.mark.parametrize("variables", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}])
def test_contradictory_rank_variables(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"rank|RANK"):
        rank_variables({**variables, "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 6),
        ({"LOCAL_WORLD_SIZE": "1"}, 6),
        ({"LOCAL_WORLD_SIZE": "2"}, 3),
        ({"LOCAL_SIZE": "4"}, 1),
        ({"LOCAL_SIZE": "32"}, 1),
        ({"SLURM_NTASKS_PER_NODE": "3"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "3,2"}, 6),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "6"}, 6),
    ],
)
def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int) -> None:
    chosen = [6]
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    environment._share_cores(variables)
    assert chosen[-1] == threads


def test_alone_everything_is_local() -> None:
    env = Environment(0, 1, 0, torch.device("cpu"))
    assert env.is_main
    assert env.sum([1.5, 2]) == [1.5, 2.0]
    assert env.gather({"a": 1}) == [{"a": 1}]
    assert env.together(lambda: 7) == [7]
    assert env.on_main(lambda: "x") == "x"
    with pytest.raises(DataError, match="gone"):
        env.together(lambda: (_ for _ in ()).throw(DataError("gone")))


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            RuntimeError(
                "[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1. This is typically…"
            ),
            "(Connection closed by peer [10.0.0.2]:1)",
        ),
        (
            RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 9000ms for recv\nmore"),
            "(Timed out waiting 9000ms for recv)",
        ),
        (dist.DistBackendError("NCCL error"), "(NCCL error)"),
        (dist.DistStoreError("wait timeout after 9000ms"), "(wait timeout after 9000ms)"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("gloo"), None),
    ],
)
def test_errors_that_a_lost_rank_causes(monkeypatch: pytest.MonkeyPatch, error: Exception, shown: str | None) -> None:
    monkeypatch.setenv("RANK", "1")
    reason = environment.lost_peer(error)
    assert (reason is None) == (shown is None)
    if shown is not None:
        assert str(reason).startswith("rank 1 on ")
        assert shown in str(reason)


def test_a_group_of_one_leaves_no_variables_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process starts later would take them for a launcher's."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    environment.start(60, need_group=True)
    assert dist.is_initialized() and set(names) <= os.environ.keys()
    environment.stop()
    assert not dist.is_initialized() and not set(names) & os.environ.keys()
