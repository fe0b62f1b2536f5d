"""`run_dir/exit.json`: how the run ended. Launchers lose exit codes; this file does not."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sltrain_dist.errors import ExitCode


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: Exit code.
        reason: One sentence for a person.
        step: Updates made.
    """

    code: ExitCode
    reason: str
    step: int


def write_running(run_dir: Path) -> None:
    """Says that the run is going on. If that is still there when no process is, the run was killed."""
    _write(run_dir, {"code": None, "reason": "running, or killed before it could say why", "step": None})


def write_outcome(run_dir: Path, outcome: Outcome, started: float) -> str | None:
    """Says how the run ended, unless another rank has said it first: its peers only lost their connection.

    Args:
        run_dir: Where exit.json is.
        outcome: How this process ended.
        started: When this process started (`time.time`); what was written before is of an earlier run.

    Returns:
        What another rank gave as the reason, or None if this one's was written.
    """
    path = run_dir / "exit.json"
    try:
        recent = path.stat().st_mtime >= started
        previous = json.loads(path.read_text())
    except (OSError, ValueError):
        recent, previous = False, {}
    if recent and previous.get("code") is not None:
        return str(previous["reason"])
    _write(run_dir, {"code": int(outcome.code), "reason": outcome.reason, "step": outcome.step})
    return None


def _write(run_dir: Path, values: dict[str, object]) -> None:
    temporary = run_dir / f".exit.json.{os.getpid()}"
    temporary.write_text(json.dumps({**values, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")
    temporary.replace(run_dir / "exit.json")
