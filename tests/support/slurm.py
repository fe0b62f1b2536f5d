"""A real SLURM cluster on this machine: a controller and compute nodes, each on a host of its own."""

from __future__ import annotations

import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support import hosts
from tests.support.hosts import Hosts

PREREQUISITES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
_START_S = 60.0
_CONF = """
ClusterName=test
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MessageTimeout=10
TCPTimeout=2
SlurmdTimeout=300
PropagateResourceLimits=NONE
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    lacking = [name for name in PREREQUISITES if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: munge, slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins)"
    return hosts.missing()


class Slurm:
    """A cluster whose nodes are all but the last of the given hosts, which runs the controller.

    Args:
        on: The hosts; they end the cluster's processes when they end.
        directory: Where its configuration, state and logs go. Its path must be short, for a socket.
    """

    def __init__(self, on: Hosts, directory: Path) -> None:
        self.hosts, self._directory = on, directory
        *self.nodes, self.controller = on.names
        self._environment = {"SLURM_CONF": str(directory / "slurm.conf")}
        directory.mkdir(parents=True)
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (directory / name).mkdir()
        conf = _CONF.format(
            controller=self.controller,
            address=on.addresses[self.controller],
            directory=directory,
            nodes=",".join(self.nodes),
        )
        nodes = [f"NodeName={node} NodeAddr={on.addresses[node]} CPUs=4 RealMemory=8000" for node in self.nodes]
        (directory / "slurm.conf").write_text(conf + "\n".join(nodes) + "\n")
        key = directory / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self._daemon(
            self.controller,
            "munged",
            "--foreground",
            "--force",  # whose directory is not only root's, as a temporary one's parents are not
            f"--key-file={key}",
            *(f"--{name}={directory}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "seed-file")),
            f"--log-file={directory}/munge.log",
        )
        self._until("munge answers", lambda: (directory / "munge.socket").exists())
        self._daemon(self.controller, "slurmctld", "-D", "-i", "-c")
        for node in self.nodes:
            self._daemon(node, "slurmd", "-D", "-c", "-N", node)
        self._until("all nodes are idle", lambda: self._idle() == len(self.nodes))

    def submit(self, command: Sequence[str | Path], environment: dict[str, str] | None = None) -> int:
        """Calls sbatch; returns the job's number."""
        shown = self._call(["sbatch", "--parsable", *command], environment)
        return int(shown.partition(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What the controller knows of a job, such as JobState and ExitCode."""
        shown = self._call(["scontrol", "--oneliner", "show", "job", str(number)])
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, number: int, limit_s: float) -> dict[str, str]:
        """Waits for a job's end; returns what the controller knows of it then."""
        self._until(f"the end of job {number}", lambda: self._ended(number), limit_s)
        return self.job(number)

    def srun(self, script: Path, *arguments: str | Path, environment: dict[str, str]) -> str:
        """Runs a Python script under srun, one task on each node; returns what all have printed."""
        task = ("--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", sys.executable)
        return self._call(["srun", *task, script, *arguments], environment)

    def signal_batch(self, number: int, which: signal.Signals) -> None:
        """Sends a signal to a job's batch shell alone."""
        self._call(["scancel", "--batch", f"--signal={which.name.removeprefix('SIG')}", str(number)])

    def cancel(self, number: int) -> None:
        """Cancels a job."""
        self._call(["scancel", str(number)])

    def _ended(self, number: int) -> bool:
        return self.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")

    def _idle(self) -> int:
        try:
            shown = self._call(["sinfo", "--noheader", "--states=idle", "--format=%D"])
        except AssertionError:  # the controller does not answer yet
            return 0
        return sum(int(count) for count in shown.split())

    def _daemon(self, host: str, *command: str) -> None:
        name = f"{command[0]}.{host}.out"
        self.hosts.popen(host, command, self._directory / name, self._environment)

    def _call(self, command: Sequence[str | Path], environment: dict[str, str] | None = None) -> str:
        return self.hosts.run(self.controller, command, {**self._environment, **(environment or {})})

    def _until(self, what: str, condition: Callable[[], bool], limit_s: float = _START_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
            time.sleep(0.1)
