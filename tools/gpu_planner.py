#!/usr/bin/env python
"""Compares the planner's predictions with the memory of all runs of a check (rows of tools/gpu_runs.py).

    python tools/gpu_planner.py DIR --out planner.jsonl

Writes a line for every set: the errors of the predicted peaks, and, for rows that had the GPU to themselves, the bytes
that the planner adds to tensors: workspaces (allocated before the model), the context (what the device has in use
beyond the allocator's memory) and fragmentation (reserved bytes beyond allocated ones, as a share).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sltrain_dist.memory.device_overhead import CONTEXT_BYTES, SLACK, WORKSPACE_BYTES
from sltrain_dist.streams import replace_unprintable


def read_runs(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of all sets in a directory, by set."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(directory.glob("runs-*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["set"], []).append(row)
    return found


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Returns the median and the extremes; None if there are no values."""
    known = sorted(values)
    return {"min": known[0], "median": statistics.median(known), "max": known[-1]} if known else None


def compare(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the line of a set."""
    measured = [row for row in rows if "error" in row]
    alone = [row for row in measured if row["alone"] and "device_used_bytes" in row]
    is_compiled = [bool(row["values"].get("train.compile")) for row in measured]
    pairs = list(zip(measured, is_compiled, strict=True))
    return {
        "set": name,
        "rows": len(rows),
        "failed": len(rows) - len(measured),
        "error_eager": spread(row["error"] for row, compiled in pairs if not compiled),
        "error_compiled": spread(row["error"] for row, compiled in pairs if compiled),
        "workspace_bytes": spread(row["before_bytes"] for row in alone),
        "context_bytes": spread(row["device_used_bytes"] - row["reserved_bytes"] for row in alone),
        "fragmentation": spread(row["reserved_bytes"] / row["allocated_bytes"] - 1 for row in alone),
        "assumed": {"workspace_bytes": WORKSPACE_BYTES, "context_bytes": CONTEXT_BYTES, "fragmentation": SLACK},
    }


def main() -> None:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory of runs-*.jsonl")
    parser.add_argument("--out", required=True, type=Path, help="file of JSON lines, to append to")
    args = parser.parse_args()
    runs = read_runs(args.directory)
    if not runs:
        sys.exit(f"gpu_planner: no rows in {args.directory}/runs-*.jsonl; run a part that trains first")
    with args.out.open("a") as out:
        for name, rows in runs.items():
            out.write(json.dumps(compare(name, rows)) + "\n")


if __name__ == "__main__":
    main()
