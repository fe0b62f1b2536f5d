"""Where the ranks of a SLURM step meet, from what srun tells each of them."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping

_FIRST_PORT, _PORTS = 10_000, 20_000
"""Below the ports that systems give to outgoing connections."""


def first_host(nodelist: str) -> str:
    """The first host of a node list such as `gpu[03-05,9],login1`; rank 0 runs there."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None  # it matches the empty text too
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first[0])


def port(environ: Mapping[str, str]) -> int:
    """A port for this step, the same on every host; steps of one job and neighbouring jobs have others."""
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_STEP_ID", 0))
    return _FIRST_PORT + (job * 16 + step) % _PORTS


def address(host: str) -> str:
    """A node's name if this host can resolve it, else the address by which SLURM reaches it."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        command = ["scontrol", "--oneliner", "show", "node", host]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return host  # the ranks will say that they cannot meet there
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    return found[1] if found else host
