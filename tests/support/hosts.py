"""Several hosts on this machine: each has a network, host name, mounts and process ids of its own.

Nothing has a global name. Every host is held by a first process, and all of it (processes, mounts, links) is gone
when that ends: at the end of the `with` block, or when the process that made it goes away.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
"""Known inside the hosts only."""
_INIT = """
set -e
mount -t proc proc /proc
hostname "$1"
mount --bind "$2" /etc/hosts
ip link set lo up
echo up
while read -r _; do :; done  # until the other end of the pipe is closed
"""
PREREQUISITES = ("ip", "nsenter", "unshare")


def missing() -> str | None:
    """Why there can be no such hosts here, or None."""
    lacking = [name for name in PREREQUISITES if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"this machine gives no network namespaces: {probe.stderr.strip()}" if probe.returncode else None


@dataclass
class Ended:
    """A process that was running on a host: its command, and when it was last seen."""

    host: str
    command: str
    seen: float


class Hosts:
    """Hosts h1, h2, … on one network. Use as a context manager.

    Args:
        count: How many.
        directory: Where their `/etc/hosts` lies.
    """

    def __init__(self, count: int, directory: Path) -> None:
        self.names = [f"h{number}" for number in range(1, count + 1)]
        self.addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(self.names, 1)}
        self._hosts_file = directory / "hosts"
        self._inits: dict[str, subprocess.Popen[str]] = {}
        self._pids: dict[str, int] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> Hosts:
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        self._hosts_file.write_text("\n".join(lines) + "\n")
        with ExitStack() as cleanup:
            cleanup.callback(self._end)
            self._start("switch")
            self._ip("switch", "link", "add", "br0", "type", "bridge")
            self._ip("switch", "link", "set", "br0", "up")
            for name, address in self.addresses.items():
                self._start(name)
                peer = ("peer", "name", "eth0", "netns", str(self._pids[name]))
                self._ip("switch", "link", "add", name, "type", "veth", *peer)
                self._ip("switch", "link", "set", name, "master", "br0", "up")
                self._ip(name, "addr", "add", f"{address}/24", "dev", "eth0")
                self._ip(name, "link", "set", "eth0", "up")
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()

    def popen(
        self, host: str, command: Sequence[str | Path], out: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host, with its output, both streams, in the file `out`."""
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("wb") as file:
            return subprocess.Popen(
                [*self._enter(host), *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def run(self, host: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
        """Runs a command on a host to its end; returns what it printed. An error if it fails."""
        done = subprocess.run(
            [*self._enter(host), *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **(environment or {})},
            check=False,
        )
        assert done.returncode == 0, f"{command} on {host}: {done.stdout}{done.stderr}"
        return done.stdout

    def cut(self, host: str) -> None:
        """Takes the host off the network. Nothing that runs there, or elsewhere, is told of it."""
        self._ip("switch", "link", "set", host, "down")

    def power_off(self, host: str) -> None:
        """The host, with all its processes, is gone at once."""
        os.kill(self._pids[host], signal.SIGKILL)
        self._inits[host].wait()

    def processes(self, host: str) -> dict[int, str]:
        """What runs on a host: command lines by process id (this machine's)."""
        init = self._pids[host]
        with suppress(OSError):
            namespace = Path(f"/proc/{init}/ns/pid").readlink()
            found = {
                int(path.name): _command(path, namespace) for path in Path("/proc").iterdir() if path.name.isdigit()
            }
            return {pid: command for pid, command in found.items() if command and pid != init}
        return {}

    def wait_until_quiet(self, limit_s: float) -> list[Ended]:
        """Waits until nothing runs on any host, at most so long.

        Returns:
            What ran, with the seconds after which each was seen for the last time; what still runs has `limit_s`.
        """
        begun, seen = time.monotonic(), dict[tuple[str, int], Ended]()
        while (now := time.monotonic() - begun) < limit_s:
            running = {(host, pid): command for host in self.names for pid, command in self.processes(host).items()}
            for key, command in running.items():
                seen.setdefault(key, Ended(key[0], command, now)).seen = now
            if not running:
                return list(seen.values())
            time.sleep(0.1)
        for key in running:
            seen[key].seen = limit_s
        return list(seen.values())

    def _start(self, name: str) -> None:
        namespaces = ["--net", "--uts", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child=KILL"]
        process = subprocess.Popen(
            ["unshare", *namespaces, "bash", "-c", _INIT, "init", name, str(self._hosts_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._hosts_file.with_name(f"{name}.log").open("w"),
            text=True,
            start_new_session=True,
        )
        self._inits[name] = process
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n", f"host {name} did not start"
        (init,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._pids[name] = int(init)

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", f"--target={self._pids[host]}", "--net", "--uts", "--mount", "--pid", f"--wd={Path.cwd()}"]

    def _ip(self, name: str, *arguments: str) -> None:
        subprocess.run(["nsenter", f"--target={self._pids[name]}", "--net", "ip", *arguments], check=True)

    def _end(self) -> None:
        for name, process in self._inits.items():
            if process.poll() is None and name in self._pids:
                with suppress(ProcessLookupError):
                    os.kill(self._pids[name], signal.SIGKILL)
            process.kill()
        for process in self._inits.values():
            with process:
                process.wait()


def _command(process: Path, namespace: Path) -> str | None:
    """The command line of a process of this namespace that still runs; None for others."""
    try:
        if (process / "ns" / "pid").readlink() != namespace:
            return None
        return (process / "cmdline").read_text(errors="replace").replace("\0", " ").strip() or None
    except OSError:
        return None
