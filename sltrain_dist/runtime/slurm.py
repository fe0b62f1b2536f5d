"""The address and port at which the ranks of a SLURM step meet, from the variables that srun sets."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping

_FIRST_PORT, _PORTS = 10_000, 20_000
"""Range of ports, below those that systems use for outgoing connections."""


def first_host(nodelist: str) -> str:
    """Returns the first host of a node list such as `gpu[03-05,9],login1`, where rank 0 runs."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None  # the pattern matches the empty text too
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first[0])


def port(environ: Mapping[str, str]) -> int:
    """Returns a port for this step, the same on every host. Other steps of the job and consecutive jobs get others."""
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_STEP_ID", 0))
    return _FIRST_PORT + (job * 16 + step) % _PORTS


def address(host: str) -> str:
    """Returns a node's name if this host can resolve it, else the address that SLURM uses for it."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        command = ["scontrol", "--oneliner", "show", "node", host]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return host  # the ranks report that they cannot connect
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    return found[1] if found else host
