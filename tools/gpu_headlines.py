"""A few readable lines about what the parts of a check have written (no torch)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """Returns the lines of a file of JSON lines; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def headlines(part: str, out: Path) -> list[str]:
    """Returns what a part has found, from its files in a directory."""
    return list(_HEADLINES[part](out))


def _environment(out: Path) -> Iterator[str]:
    for row in read(out / "environment.jsonl"):
        yield f"{row['device']}, torch {row['torch']}, CUDA {row['cuda']}, commit {row['commit']}"


def _run(out: Path) -> Iterator[str]:
    tests = [row for file in sorted(out.glob("tests-*.jsonl")) for row in read(file)]
    if tests:
        counts = Counter(row["outcome"] for row in tests)
        yield "tests: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        yield from (f"failed: {row['test']}" for row in tests if row["outcome"] == "failed")
    sets = {name: read(out / f"runs-{name}.jsonl") for name in ("engines", "ddp", "compiled", "fsdp", "zero")}
    for name, rows in sets.items():
        yield f"{name}: {sum('failed' not in row for row in rows)} of {len(rows)} configurations ran"
        yield from _failures(rows)
    losses: dict[str, list[float]] = {}
    for row in sets["engines"]:
        if "losses" in row:
            losses.setdefault(row["values"]["train.dtype"], []).append(row["losses"][-1])
    for dtype, last in losses.items():
        yield f"last losses of {len(last)} engines, {dtype}: {min(last):.4f} to {max(last):.4f}"


def _layer(out: Path) -> Iterator[str]:
    for row in read(out / "layer.jsonl"):
        for method in row.get("layer", ()):
            ratios = (method["seconds_ratio"], method["kernels_ratio"], method["predicted_ratio"])
            wall, kernels, predicted = ("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
            yield (
                f"{row['preset']} {method['method']}: {method['seconds'] * 1e3:.1f} ms, {wall} of nn.Linear "
                f"(kernels {kernels}, predicted {predicted})"
            )


def _models(name: str) -> Callable[[Path], Iterator[str]]:
    def lines(out: Path) -> Iterator[str]:
        rows = read(out / f"runs-{name}.jsonl")
        full = {_is_compiled(row): row for row in rows if _is_full(row) and "failed" not in row}
        for row in rows:
            if "failed" in row:
                continue
            reference = full.get(_is_compiled(row))
            speedup = f", {row['tokens_per_s'] / reference['tokens_per_s']:.2f} of full rank" if reference else ""
            used = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
            yield (
                f"{_described(row)}: {row['tokens_per_s']:.0f} tokens/s{speedup}{used}, "
                f"{row['peak_bytes'] / 1e9:.2f} GB, predicted {row['error']:+.1%}"
            )
        yield from _failures(rows)

    return lines


def _planner(out: Path) -> Iterator[str]:
    for row in read(out / "planner.jsonl"):
        for key in ("error_eager", "error_compiled"):
            if row[key]:
                yield f"{row['set']}, {key.removeprefix('error_')}: {row[key]['min']:+.1%} to {row[key]['max']:+.1%}"
        if row["context_bytes"]:
            context, assumed = row["context_bytes"]["median"], row["assumed"]["context_bytes"]
            yield f"{row['set']}: context {context / 1e6:.0f} MB (assumed {assumed / 1e6:.0f})"
            share = row["fragmentation"]
            yield f"{row['set']}: fragmentation {share['min']:.1%} to {share['max']:.1%}"
    errors = [row["error"] for row in read(out / "planner-random.jsonl") if "error" in row]
    if errors:
        yield f"{len(errors)} random configurations: {min(errors):+.1%} to {max(errors):+.1%}"


def _quality(out: Path) -> Iterator[str]:
    for row in read(out / "quality.jsonl"):
        if "failed" in row:
            yield f"failed: {row['method']}: {row['failed'].splitlines()[-1]}"
        elif "compared_at_step" in row:
            losses = ", ".join(f"{method} {loss:.3f}" for method, loss in row["eval_loss"].items())
            yield f"validation loss after {row['compared_at_step']} updates: {losses}"


def _is_full(row: Row) -> bool:
    return bool(row["values"].get("reparam.method") == "full")


def _is_compiled(row: Row) -> bool:
    return bool(row["values"].get("train.compile"))


def _described(row: Row) -> str:
    sizes = ("preset", "train.micro_batch", "train.global_batch")
    return ", ".join(f"{key.partition('.')[2]}={value}" for key, value in row["values"].items() if key not in sizes)


def _failures(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        if "failed" in row:
            yield f"failed: {row['set']} {row['number']} ({_described(row)}): {row['failed'].splitlines()[0][:200]}"


_HEADLINES: dict[str, Callable[[Path], Iterator[str]]] = {
    "environment": _environment, "run": _run, "layer": _layer, "1b": _models("1b"), "7b": _models("7b"),
    "130m": _models("130m"), "planner": _planner, "quality": _quality,
}  # fmt: skip
