"""Secure shells between hosts of :mod:`.hosts`, for launchers that need them; nothing outside the hosts sees them."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from tests.support import hosts
from tests.support.hosts import Hosts

PREREQUISITES = ("pdsh", "ssh", "ssh-keygen")
_SSHD = "/usr/sbin/sshd"  # it insists on being called by its whole path
_SERVER = """
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""
_CLIENT = """
Host *
    IdentityFile {directory}/user_key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def missing() -> str | None:
    """Why there can be no secure shells here, or None."""
    lacking = [name for name in PREREQUISITES if shutil.which(name) is None]
    if not Path(_SSHD).exists():
        lacking.append(_SSHD)
    return f"needs {', '.join(lacking)} (Debian: pdsh, openssh-server)" if lacking else hosts.missing()


def start(on: Hosts, directory: Path) -> None:
    """Lets every host log in to every other without a password."""
    directory.mkdir(parents=True)
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    (directory / "sshd_config").write_text(_SERVER.format(directory=directory))
    (directory / "ssh_config").write_text(_CLIENT.format(directory=directory))
    for host in on.names:
        on.run(host, ["mount", "--bind", directory / "ssh_config", "/etc/ssh/ssh_config"])
        on.run(host, ["mount", "-t", "tmpfs", "tmpfs", "/run"])  # sshd needs a directory there
        on.run(host, ["mkdir", "-m", "0755", "/run/sshd"])
        on.popen(host, [_SSHD, "-D", "-e", "-f", directory / "sshd_config"], directory / f"sshd.{host}.log")
    end = time.monotonic() + 30
    for host in on.names:
        while True:
            try:
                on.run(on.names[0], ["ssh", host, "true"])
                break
            except AssertionError:
                assert time.monotonic() < end, f"no secure shell to {host}"
                time.sleep(0.1)
