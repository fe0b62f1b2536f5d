"""tools/timed_parts.py: limits, parts that hang, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.runtime.reaper import Process
from tests.support.paths import REPO

sys.path.insert(0, str(REPO / "tools"))

import timed_parts
from timed_parts import KILL_S, TERM_S, Job, Part, limit_s, run_part, run_parts

END_S = TERM_S + KILL_S
HANGS = """
setsid sleep 600 & echo "{\\"pid\\": $!}" >>"$0"
sleep 600 & echo "{\\"pid\\": $!}" >>"$0"
printf '{"incomplete' >>"$0"
wait
"""
"""Writes the ids of two children, of which one leaves its process group, and half a line."""


def bash(name: str, script: str) -> Job:
    return Job(name, ("bash", "-c", script, "FILE"))


def run(part: Part, out: Path, limit: float = 60.0) -> dict[str, Any]:
    return run_part(part, out, limit, os.environ, out)


def pids(file: Path) -> list[int]:
    return [json.loads(line)["pid"] for line in file.read_text().splitlines()]


def test_limits_are_shares_of_what_is_left_but_no_less_than_floors() -> None:
    parts = [Part("a", 3, 10, ()), Part("b", 1, 10, ()), Part("c", 5, 10, (), skipped="no text")]
    assert limit_s(parts, 110 + END_S - 10) == 75
    assert limit_s(parts, 12 + END_S) == 10
    assert limit_s(parts, 9 + END_S) is None
    assert limit_s(parts[1:], 40 + END_S) == 40


@pytest.mark.parametrize("seconds", [15.0, 60.0, 100.0, 540.0, 1500.0])
def test_parts_that_all_reach_their_limits_end_in_time(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    parts = [Part(str(share), share, floor, ()) for share, floor in ((6, 90), (0.5, 60), (3, 20), (2, 30), (5, 120))]

    def takes_all(part: Part, out: Path, limit: float, *unused: object) -> dict[str, Any]:
        nonlocal now
        assert limit >= part.floor_s
        now += limit + END_S
        return {"status": "cut off"}

    monkeypatch.setattr(timed_parts.time, "monotonic", lambda: now)
    monkeypatch.setattr(timed_parts, "run_part", takes_all)
    done: list[dict[str, Any]] = []

    def report(records: list[dict[str, Any]]) -> bool:
        done[:] = records
        return True

    run_parts(parts, Path(), seconds, {}, Path(), report)
    assert len(done) == 5 and {record["status"] for record in done} <= {"cut off", "not run"}
    assert now <= 1000.0 + seconds
    assert (done[0]["status"] == "not run") is (seconds < 90 + END_S)


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_parts, "TERM_S", 0.5)
    jobs = (bash("hangs", HANGS), bash("ignores", f"trap '' TERM\n{HANGS}"), bash("ends", 'echo "{}" >>"$0"'))
    record = run(Part("x", 1, 1, jobs), tmp_path, limit=8.0)
    assert record["status"] == "cut off"
    assert [job["cut_off"] for job in record["jobs"]] == [True, True, False]
    assert [job["lines"] for job in record["jobs"]] == [2, 2, 1]
    assert record["jobs"][1]["exit_status"] == -signal.SIGKILL
    for name in ("hangs", "ignores"):
        found = pids(tmp_path / f"{name}.jsonl")
        assert len(found) == 2 and all(Process.of(pid) is None for pid in found)


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    record = run(Part("x", 1, 1, (bash("a", 'sleep 600 & echo "{\\"pid\\": $!}" >>"$0"'),)), tmp_path)
    assert record["status"] == "done"
    (pid,) = pids(tmp_path / "a.jsonl")
    timed_parts._until(lambda: Process.of(pid) is None, [], KILL_S)
    assert Process.of(pid) is None


def test_an_interruption_ends_the_commands(tmp_path: Path) -> None:
    def interrupt(*unused: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 4.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Part("x", 1, 1, (bash("a", HANGS),)), tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(Process.of(pid) is None for pid in pids(tmp_path / "a.jsonl"))


def test_a_command_that_fails_leaves_its_lines_and_what_it_printed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"from": "an earlier check"}\n')
    jobs = (bash("a", 'echo "{}" >>"$0"; echo why >&2; exit 3'), bash("b", "exit 0"))
    record = run(Part("x", 1, 1, jobs), tmp_path)
    assert record["status"] == "failed"
    assert record["jobs"] == [
        {"file": "a.jsonl", "exit_status": 3, "cut_off": False, "lines": 1, "printed": "why"},
        {"file": "b.jsonl", "exit_status": 0, "cut_off": False, "lines": 0, "printed": ""},
    ]
    assert (tmp_path / "a.log").read_text() == "why\n"


def test_parts_are_skipped_not_run_or_the_last(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def report(records: list[dict[str, Any]]) -> bool:
        seen.append([record["status"] for record in records])
        return len(records) < 3

    parts = [
        Part("a", 1, 1, (), skipped="no text"), Part("b", 1, 1e6, ()), Part("c", 1, 1, (bash("c", "true"),)),
        Part("d", 1, 1, ()),
    ]  # fmt: skip
    run_parts(parts, tmp_path, 100.0, os.environ, tmp_path, report)
    assert seen == [["skipped"], ["skipped", "not run"], ["skipped", "not run", "done"]]
