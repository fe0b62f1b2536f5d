"""A pytest plugin that writes the outcome of every test as a line of JSON as soon as the test has ended.

    PYTHONPATH=tools python -m pytest -p pytest_lines --lines tests.jsonl tests/gpu

A time limit then loses neither outcomes nor the messages of failures.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, required=True, help="file of JSON lines, to append to")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Lines(config.getoption("--lines")))


class _Lines:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write({"test": report.nodeid, "outcome": "failed", "message": report.longreprtext[-4000:]})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that is not called has been skipped, or failed before; one that was called may fail afterwards.
        if report.when != "call" and report.passed:
            return
        message = {} if report.passed else {"message": report.longreprtext[-4000:]}
        self._write({"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), **message})

    def _write(self, record: dict[str, object]) -> None:
        with self._path.open("a") as out:
            out.write(json.dumps(record) + "\n")
