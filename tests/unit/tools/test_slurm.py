"""Where the ranks of a SLURM step meet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sltrain_dist.runtime import slurm


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[7,9-12],login1", "gpu7"),
        ("rack[2-3]node[08-11].site", "rack2node08.site"),
        ("login1,gpu[1-2]", "login1"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert slurm.first_host(nodelist) == host


def test_ports_differ_between_jobs_and_steps() -> None:
    ports = [slurm.port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in (7, 8) for step in range(4)]
    assert len(set(ports)) == 8
    assert all(1024 < port < 32_768 for port in (*ports, slurm.port({"SLURM_JOB_ID": "4294967290"})))


def test_a_name_that_does_not_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.address("localhost") == "localhost"
    node = "no-such-node.invalid"
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.address(node) == node, "there is no scontrol"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\n[ "$4" = {node} ] && echo "NodeName=$4 NodeAddr=10.1.2.3 NodeHostName=x"\n')
    scontrol.chmod(0o755)
    assert subprocess.run([scontrol, "--oneliner", "show", "node", "other"], check=False).returncode == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.address(node) == "10.1.2.3"
