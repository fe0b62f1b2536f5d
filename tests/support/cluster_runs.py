"""Runs over two hosts, and what all of them must have done after a fault."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.hosts import Ended, Hosts
from tests.support.runs import LAUNCH, TIMEOUT_S, last_step, outcome

TIMEOUT_OF_RUNS_S = 8
PROMISED_S = TIMEOUT_OF_RUNS_S + 60
"""After a fault everything must have ended by then."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
DEEPSPEED = Path(sys.executable).with_name("deepspeed")


@dataclass
class TwoHosts:
    """A run whose ranks are on the hosts h1 and h2, with one launcher on each."""

    hosts: Hosts
    run_dir: Path
    launchers: dict[str, subprocess.Popen[bytes]]

    def output(self, host: str) -> str:
        """Everything that launcher and rank have printed there."""
        return self.run_dir.with_name(f"{host}.out").read_text()

    def until_step(self, step: int) -> None:
        """Waits until the run has come so far."""
        end = time.monotonic() + TIMEOUT_S
        while last_step(self.run_dir) < step:
            assert time.monotonic() < end, self.output("h1") + self.output("h2")
            assert any(process.poll() is None for process in self.launchers.values()), self.output("h1")
            time.sleep(0.05)

    def wait(self) -> dict[str, int]:
        """Waits for the launchers' ends; returns their exit codes."""
        return {host: process.wait(TIMEOUT_S) for host, process in self.launchers.items()}

    def ends(self) -> list[Ended]:
        """Asserts that nothing is left on any host in the promised time after a fault; returns what was when seen."""
        ended = self.hosts.wait_until_quiet(PROMISED_S)
        left = [process for process in ended if process.seen >= PROMISED_S]
        assert not left, f"still there after {PROMISED_S} s: {left}"
        return ended

    def assert_reported(self, host: str) -> None:
        """Asserts that launcher and rank there have failed, and have said what happened."""
        assert self.launchers[host].wait(TIMEOUT_S) != 0
        rank = int(host[1:]) - 1
        assert f"error: rank {rank} on {host} has lost another rank" in self.output(host)
        said = outcome(self.run_dir)
        assert said["code"] == 1
        assert "has lost another rank" in said["reason"]


@contextmanager
def two_hosts(
    hosts: Hosts, config: Path, run_dir: Path, launcher: Callable[[int], list[str]], *overrides: str
) -> Iterator[TwoHosts]:
    """A run over both hosts.

    Args:
        hosts: h1 and h2.
        config: Of the run.
        run_dir: Of the run; output goes beside it.
        launcher: The launcher's command on the host with this number, from 0.
        overrides: More of the configuration.
    """
    program = (LAUNCH, "--config", config, f"run_dir={run_dir}", *overrides)
    launchers = {
        host: hosts.popen(host, [*launcher(number), *program], run_dir.with_name(f"{host}.out"), ENVIRONMENT)
        for number, host in enumerate(hosts.names)
    }
    try:
        yield TwoHosts(hosts, run_dir, launchers)
    finally:
        for process in launchers.values():
            process.kill()  # what it has started ends with its host
            process.wait(TIMEOUT_S)


def torchrun_static(number: int) -> list[str]:
    """torchrun that is told its place."""
    where = ("--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1", "--master-addr=h1", "--master-port=29500")
    return [sys.executable, "-m", "torch.distributed.run", *where]


def torchrun_c10d(number: int) -> list[str]:
    """torchrun whose agents find their places in a store on the first host."""
    where = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=h1:29500", "--rdzv-id=7")
    return [sys.executable, "-m", "torch.distributed.run", *where]


def deepspeed_no_ssh(hostfile: Path) -> Callable[[int], list[str]]:
    """DeepSpeed's launcher, started by hand on each host."""

    def launcher(number: int) -> list[str]:
        where = (f"--node_rank={number}", "--master_addr=h1", "--master_port=29500", f"--hostfile={hostfile}")
        return [sys.executable, str(DEEPSPEED), "--no_ssh", *where]

    return launcher
