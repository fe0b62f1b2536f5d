"""launch/slurm/pretrain.sbatch on a real SLURM of two nodes, and srun by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import slurm
from tests.support.cluster_runs import ENVIRONMENT, PROMISED_S, TIMEOUT_OF_RUNS_S
from tests.support.hosts import Hosts
from tests.support.runs import (
    LAUNCH,
    REPO,
    TIMEOUT_S,
    Corpus,
    last_step,
    outcome,
    saved_steps,
    tiny_config,
    write_config,
)
from tests.support.slurm import Slurm

MISSING = slurm.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
SBATCH = REPO / "launch" / "slurm" / "pretrain.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Nodes h1 and h2, and the controller h3."""
    directory = tmp_path_factory.mktemp("slurm")
    with Hosts(3, directory) as hosts:
        yield Slurm(hosts, directory / "s")


@pytest.fixture(scope="module")
def short(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny_config(corpus, train={"steps": 3}, checkpoint={"every": 0}, eval={"every": 0})
    return write_config(tmp_path_factory.mktemp("cluster") / "short.yaml", values)


class Job:
    """A job of the batch script on both nodes."""

    def __init__(self, cluster: Slurm, config: Path, run_dir: Path, *overrides: str, options: tuple[str, ...] = ()):
        self._cluster, self._out, self.run_dir = cluster, run_dir.with_name("job.out"), run_dir
        (run_dir.parent / "environment").write_text("export OF_THE_HOOK=sourced\n")
        command = ["--nodes=2", f"--chdir={REPO}", f"--output={self._out}", *options, SBATCH]
        variables = {
            **ENVIRONMENT,
            "SLTRAIN_REPO": str(REPO),
            "SLTRAIN_ENV": str(run_dir.parent / "environment"),
            "SLTRAIN_CONTAINER": f"env IN_A=container bash {run_dir.parent}/container",
        }
        # Stands for a container: notes where it was entered and that the hook's variable has come along.
        (run_dir.parent / "container").write_text(
            f'echo "$IN_A $OF_THE_HOOK" >"{run_dir.parent}/seen.$(hostname)"\nexec "$@"\n'
        )
        self.number = cluster.submit([*command, "--config", config, f"run_dir={run_dir}", *overrides], variables)

    @property
    def log(self) -> str:
        return self._out.read_text()

    def until(self, step: int) -> None:
        end = time.monotonic() + TIMEOUT_S
        while last_step(self.run_dir) < step:
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    def state(self, limit_s: float = TIMEOUT_S) -> tuple[str, str]:
        """State and exit code, once it has ended."""
        ended = self._cluster.wait(self.number, limit_s)
        return ended["JobState"], ended["ExitCode"]


def test_a_job_runs_to_its_end(cluster: Slurm, short: Path, tmp_path: Path) -> None:
    job = Job(cluster, short, tmp_path / "run")
    assert job.state() == ("COMPLETED", "0:0"), job.log
    assert outcome(job.run_dir) == {"code": 0, "reason": "done", "step": 3}
    assert saved_steps(job.run_dir) == [3]
    assert "meeting at h1:" in job.log
    assert "2 × CPU" in job.log
    assert '"reason": "done"' in job.log
    logs = job.run_dir / "logs" / f"{job.number}.0"
    assert {path.name for path in logs.iterdir()} == {"rank_0000.log", "rank_0001.log"}
    assert "step 3/3" in (logs / "rank_0000.log").read_text()
    assert "step 3/3" not in (logs / "rank_0001.log").read_text()
    assert {path.name: path.read_text() for path in tmp_path.glob("seen.*")} == {
        "seen.h1": "container sourced\n",
        "seen.h2": "container sourced\n",
    }


def test_a_wrong_configuration_starts_nothing(cluster: Slurm, short: Path, tmp_path: Path) -> None:
    job = Job(cluster, short, tmp_path / "run", "optim.lrr=1")
    assert job.state() == ("FAILED", "2:0"), job.log
    assert "optim.lrr" in job.log
    assert not job.run_dir.exists()


def test_a_task_is_killed(cluster: Slurm, short: Path, tmp_path: Path) -> None:
    job = Job(cluster, short, tmp_path / "run", f"parallel.timeout_s={TIMEOUT_OF_RUNS_S}", "train.steps=1000000")
    job.until(3)
    (rank,) = [
        pid
        for pid, command in cluster.hosts.processes("h2").items()
        if " -u launch/pretrain.py" in command and "distributed.run" not in command
    ]
    os.kill(rank, signal.SIGKILL)
    assert job.state(PROMISED_S) == ("FAILED", "1:0"), job.log
    said = outcome(job.run_dir)
    assert said["code"] == 1
    assert "rank 0 on h1 has lost another rank" in said["reason"]
    assert said["reason"] in job.log


def test_a_job_near_its_time_limit_goes_on_later(cluster: Slurm, short: Path, tmp_path: Path) -> None:
    """The signal that SLURM sends the batch shell before the limit, and --requeue."""
    job = Job(cluster, short, tmp_path / "run", "train.steps=1000000", options=("--requeue",))
    job.until(3)
    cluster.signal_batch(job.number, signal.SIGUSR1)
    end = time.monotonic() + TIMEOUT_S
    while not saved_steps(job.run_dir):
        assert time.monotonic() < end, job.log
        time.sleep(0.1)
    (stopped_at,) = saved_steps(job.run_dir)
    job.until(stopped_at + 2)
    assert cluster.job(job.number)["Restarts"] == "1"
    assert "stopped early with everything saved: requeued" in job.log
    assert f"at update {stopped_at}" in job.log
    assert not (job.run_dir / "STOP").exists()
    cluster.cancel(job.number)
    assert job.state()[0] == "CANCELLED"


def test_srun_alone(cluster: Slurm, short: Path, tmp_path: Path) -> None:
    """Ranks and meeting point from SLURM's variables."""
    out = cluster.srun(LAUNCH, "--config", short, f"run_dir={tmp_path}/run", environment=ENVIRONMENT)
    assert outcome(tmp_path / "run") == {"code": 0, "reason": "done", "step": 3}, out
    assert "2 × CPU" in out
