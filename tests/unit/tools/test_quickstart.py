"""tools/quickstart.sh, with stand-ins for what it starts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPO


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script in a checkout whose set-up is done, and whose `deepspeed` only says how it was called."""
    (tmp_path / "tools").mkdir()
    shutil.copy(REPO / "tools" / "quickstart.sh", tmp_path / "tools")
    (tmp_path / "tools" / "setup.sh").write_text("")
    bin_directory = tmp_path / ".venv" / "bin"
    bin_directory.mkdir(parents=True)
    (bin_directory / "activate").write_text(f"PATH={bin_directory}:$PATH\n")
    (bin_directory / "deepspeed").write_text('#!/bin/sh\necho "$DS_ACCELERATOR" "$@"\n')
    (bin_directory / "deepspeed").chmod(0o755)
    return tmp_path


def start(checkout: Path, *arguments: str, **variables: str) -> tuple[str, list[str]]:
    """What it says first, and the words that `deepspeed` was called with."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MASTER_PORT", "DS_ACCELERATOR")}
    command = ["bash", checkout / "tools" / "quickstart.sh", *arguments]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    said, called = done.stdout.splitlines()
    return said, called.split()


def test_a_free_port_is_found_and_overrides_are_passed_on(checkout: Path) -> None:
    said, called = start(checkout, "train.steps=30")
    assert called[:3] == ["cpu", "--num_accelerators", "2"]
    assert called[-2:] == ["configs/quickstart.yaml", "train.steps=30"]
    port = called[called.index("--master_port") + 1]
    assert f"port {port}" in said
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(port)))


def test_the_users_port_and_accelerator_win(checkout: Path) -> None:
    _, called = start(checkout, MASTER_PORT="12345", DS_ACCELERATOR="cuda")
    assert called[0] == "cuda"
    assert called[called.index("--master_port") + 1] == "12345"
