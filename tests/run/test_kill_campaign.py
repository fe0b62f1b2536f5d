"""The tool that kills runs finds them equal to those that were left alone, and would say so if they were not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.runs import REPO, Process


def test_runs_killed_at_random_moments_are_as_if_never_killed(tmp_path: Path) -> None:
    tool = REPO / "tools" / "kill_campaign.py"
    options = ["--kills", "3", "--steps", "12", "--engines", "single", "--json"]
    with Process([sys.executable, tool, *options], tmp_path / "tool") as process:
        assert process.wait() == 0, process.stdout + process.stderr
        report = json.loads(process.stdout)
    single = report["engines"]["single"]
    assert (report["kills"], report["all_equal"], single["problems"]) == (3, True, [])
    assert sum(single["by_moment"].values()) == 3
    assert single["runs"] == single["equal"] >= 1
