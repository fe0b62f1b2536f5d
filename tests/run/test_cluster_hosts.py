"""Runs over two hosts: to the end, and with one of them lost, when everything ends in time and says why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hosts as cluster
from tests.support import ssh
from tests.support.cluster_runs import (
    DEEPSPEED,
    ENVIRONMENT,
    TIMEOUT_OF_RUNS_S,
    deepspeed_no_ssh,
    torchrun_c10d,
    torchrun_static,
    two_hosts,
)
from tests.support.hosts import Hosts
from tests.support.runs import LAUNCH, TIMEOUT_S, Corpus, outcome, saved_steps, tiny_config, trajectory, write_config

MISSING = cluster.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ENDLESS = (
    f"parallel.timeout_s={TIMEOUT_OF_RUNS_S}",
    "train.steps=1000000",
    "checkpoint.every=0",
    "eval.source=null",
    "optim.schedule=constant",
)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(2, tmp_path) as both:
        yield both


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("h1 slots=1\nh2 slots=1\n")
    return path


@pytest.fixture(scope="module")
def short(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny_config(corpus, train={"steps": 3}, checkpoint={"every": 0}, eval={"every": 0})
    return write_config(tmp_path_factory.mktemp("cluster") / "short.yaml", values)


def assert_equal_to_one_process(run_dir: Path, finished: Path) -> None:
    """The first updates of a run are those of `finished`, which one process has made."""
    assert outcome(run_dir) == {"code": 0, "reason": "done", "step": 3}
    assert saved_steps(run_dir) == [3]
    got = [line["eval_loss"] for line in trajectory(run_dir) if "eval_loss" in line]
    want = [line["eval_loss"] for line in trajectory(finished) if "eval_loss" in line]
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert got[-1] < got[0]


def test_torchrun(hosts: Hosts, short: Path, finished: Path, tmp_path: Path) -> None:
    with two_hosts(hosts, short, tmp_path / "run", torchrun_static) as run:
        assert run.wait() == {"h1": 0, "h2": 0}, run.output("h1") + run.output("h2")
        assert "done (step 3, exit code 0)" in run.output("h1")
        assert "done" not in run.output("h2")
    assert_equal_to_one_process(tmp_path / "run", finished)


def test_deepspeed_without_ssh(hosts: Hosts, hostfile: Path, short: Path, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launcher = deepspeed_no_ssh(hostfile)
    with two_hosts(hosts, short, tmp_path / "run", launcher, "parallel.engine=zero") as run:
        assert run.wait() == {"h1": 0, "h2": 0}, run.output("h1") + run.output("h2")
    assert_equal_to_one_process(tmp_path / "run", finished)


@pytest.mark.skipif(ssh.missing() is not None, reason=str(ssh.missing()))
def test_deepspeed_with_a_hostfile(hosts: Hosts, hostfile: Path, short: Path, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    ssh.start(hosts, tmp_path / "ssh")
    run_dir, out = tmp_path / "run", tmp_path / "h1.out"
    passed_on = tmp_path / "environment"
    passed_on.write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    command = [sys.executable, DEEPSPEED, f"--hostfile={hostfile}", "--master_port=29500", LAUNCH, "--config", short]
    variables = {**ENVIRONMENT, "DS_ENV_FILE": str(passed_on)}
    process = hosts.popen("h1", [*command, f"run_dir={run_dir}"], out, variables)
    assert process.wait(TIMEOUT_S) == 0, out.read_text()
    assert "h1: " in out.read_text()
    assert_equal_to_one_process(run_dir, finished)


def test_a_link_is_cut(hosts: Hosts, short: Path, tmp_path: Path) -> None:
    """torchrun's agent beside the cut-off rank would go on asking the store on the other host for minutes."""
    with two_hosts(hosts, short, tmp_path / "run", torchrun_c10d, *ENDLESS) as run:
        run.until_step(3)
        hosts.cut("h2")
        ended = run.ends()
        for host in hosts.names:
            run.assert_reported(host)
            assert f"Timed out waiting {TIMEOUT_OF_RUNS_S}000ms" in run.output(host)
            assert any("torch.distributed.run" in process.command for process in ended if process.host == host)


def test_a_host_is_powered_off(hosts: Hosts, short: Path, tmp_path: Path) -> None:
    with two_hosts(hosts, short, tmp_path / "run", torchrun_static, *ENDLESS) as run:
        run.until_step(3)
        hosts.power_off("h2")
        assert {process.host for process in run.ends()} <= {"h1"}
        run.assert_reported("h1")
        assert "done" not in run.output("h2")


def test_hosts_are_apart_and_leave_nothing_behind(tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as both:
        assert both.run("h1", ["hostname"]) == "h1\n"
        sleeper = both.popen("h2", ["sleep", "1000"], tmp_path / "out")
        while not (pids := [pid for pid, command in both.processes("h2").items() if command == "sleep 1000"]):
            assert sleeper.poll() is None
        assert not both.processes("h1")
        both.power_off("h1")
        assert both.processes("h2")
    assert sleeper.wait(TIMEOUT_S) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    assert "br0" not in links
