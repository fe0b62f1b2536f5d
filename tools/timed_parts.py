"""Runs the parts of a check one after another within a time limit, of which each gets a share.

A part consists of commands that run side by side. At its limit they are ended with all processes that they have
started. Commands append their results to a file of JSON lines, so that what they found before is not lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltrain_dist.runtime.reaper import Process

TERM_S = 5.0
"""Seconds after SIGTERM until a part that has reached its limit gets SIGKILL."""
KILL_S = 5.0
"""Longest wait for processes to be gone after SIGKILL."""
_POLL_S = 0.1


@dataclass(frozen=True)
class Job:
    """A command of a part.

    Attributes:
        name: Its results are in DIR/name.jsonl, and what it prints in DIR/name.log.
        command: Program and arguments. FILE stands for the path of the results, DIR for their directory, and LIMIT for
            the part's limit in seconds.
    """

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Commands that run side by side.

    Attributes:
        name: Name of the part.
        share: Its share of the time, relative to those of the parts after it.
        floor_s: Seconds that it gets at least; with less left, it is not run.
        jobs: The commands.
        skipped: Why the part is not run at all; empty if it is.
    """

    name: str
    share: float
    floor_s: float
    jobs: tuple[Job, ...]
    skipped: str = ""


def limit_s(parts: Sequence[Part], left_s: float) -> float | None:
    """Returns the limit of the first of some parts, in seconds.

    Args:
        parts: The parts that are not done yet.
        left_s: Seconds left for all of them.

    Returns:
        Its share of what is left, but at least its floor. None if too little is left for the floor.
    """
    shares = sum(part.share for part in parts if not part.skipped)
    usable = left_s - TERM_S - KILL_S  # for ending the part if it reaches its limit
    limit = max(parts[0].floor_s, usable * parts[0].share / shares)
    return limit if limit <= usable else None


def run_parts(
    parts: Sequence[Part],
    out: Path,
    seconds: float,
    environment: Mapping[str, str],
    cwd: Path,
    report: Callable[[list[dict[str, Any]]], bool],
) -> None:
    """Runs parts in their order. All have ended after `seconds`; those that could not begin any more are not run.

    Args:
        parts: The parts.
        out: Existing directory of the results.
        seconds: Time for all parts.
        environment: Environment variables of the commands.
        cwd: Their working directory.
        report: Called after every part, with what became of all parts so far. Returns whether to go on.
    """
    end, done = time.monotonic() + seconds, []
    for number, part in enumerate(parts):
        record: dict[str, Any] = {"part": part.name, "status": "skipped", "reason": part.skipped}
        if not part.skipped:
            limit = limit_s(parts[number:], end - time.monotonic())
            if limit is None:
                record |= {"status": "not run", "reason": f"less than its {part.floor_s:.0f} s were left"}
            else:
                print(f"{part.name}: at most {limit:.0f} s", flush=True)
                record = {"part": part.name, **run_part(part, out, limit, environment, cwd)}
        done.append(record)
        if not report(done):
            return


def run_part(part: Part, out: Path, limit: float, environment: Mapping[str, str], cwd: Path) -> dict[str, Any]:
    """Runs a part for at most `limit` seconds, and returns what became of it."""
    start = time.monotonic()
    files = [out / f"{job.name}.jsonl" for job in part.jobs]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for job, file in zip(part.jobs, files, strict=True):
            file.unlink(missing_ok=True)
            with file.with_suffix(".log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        _filled(job.command, file, limit),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=dict(environment),
                        cwd=cwd,
                        start_new_session=True,
                    )
                )
        cut_off = _wait(started, start + limit)
    finally:
        end(started)
        lines = [whole_lines(file) for file in files]
    jobs = [
        {"file": file.name, "exit_status": process.returncode, "cut_off": process in cut_off, "lines": count}
        | {"printed": last_line(file.with_suffix(".log"))}
        for file, process, count in zip(files, started, lines, strict=True)
    ]
    failed = any(job["exit_status"] and not job["cut_off"] for job in jobs)
    status = "failed" if failed else "cut off" if cut_off else "done"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "limit_s": round(limit, 1), "jobs": jobs}


def _filled(command: Sequence[str], file: Path, limit: float) -> list[str]:
    values = {"FILE": str(file), "DIR": str(file.parent), "LIMIT": f"{limit:.0f}"}
    return [values.get(word, word) for word in command]


def _wait(processes: Sequence[subprocess.Popen[bytes]], end_at: float) -> list[subprocess.Popen[bytes]]:
    """Waits for processes, and returns those that still run at a time of the monotonic clock."""
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end_at - time.monotonic()))
    return [process for process in processes if process.poll() is None]


def end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes and all that they have started: by SIGTERM first, then by SIGKILL."""
    running = [process for process in started if process.poll() is None]
    trees = [each for process in running for each in _tree(Process.of(process.pid))]
    for each in trees:
        each.signal(signal.SIGTERM)
    _until(lambda: not any(each.runs for each in trees), running, TERM_S)
    trees += [each for process in running for each in _tree(Process.of(process.pid))]
    for each in trees:
        each.signal(signal.SIGKILL)
    for process in started:  # what was started by those that have ended by themselves
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    _until(lambda: not any(each.runs for each in trees), running, KILL_S)


def _tree(process: Process | None) -> Iterator[Process]:
    if process is not None:
        yield process
        for child in process.children():
            yield from _tree(child)


def _until(condition: Callable[[], bool], running: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Waits at most some seconds for a condition, and takes note of processes that have ended."""
    end_at = time.monotonic() + seconds
    while not condition() and time.monotonic() < end_at:
        time.sleep(_POLL_S)
        for process in running:
            process.poll()
    for process in running:  # also of those that had ended before the first wait
        process.poll()


def whole_lines(file: Path) -> int:
    """Removes the incomplete last line of a command that was killed, and returns the number of lines."""
    if not file.exists():
        return 0
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
    return content.count(b"\n")


def last_line(log: Path) -> str:
    """Returns the last line that a command printed, and at most 300 characters of it."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
