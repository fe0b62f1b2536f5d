#!/usr/bin/env python
"""What there is to check and to measure on a GPU, most valuable first, within a time limit.

    bash tools/gpu_check.sh --out DIR
    bash tools/gpu_check.sh --out DIR --minutes 9 --text wiki.json.gz --tokenizer t5.model
    bash tools/gpu_check.sh --out DIR --device cpu --rehearse

Needs torch with CUDA and the project's packages; installs nothing, and needs no launcher. The parts, in their order:

    run      does it run: tests/gpu, an update of every engine, and many configurations, side by side
    layer    linear layers of 1B and 7B: ratio to nn.Linear, time by kernel, and what the roofline predicts
    1b       whole 1B models against full rank: tokens/s, MFU, memory; eager and compiled
    7b       whole 7B models: the paper's settings, those with the least memory, and others
    130m     whole 130M models, as 1b
    planner  predicted against allocated memory of all of these runs, and of random configurations
    quality  60M models of all methods on --text, compared after equally many tokens

The time is divided over the parts by shares, and every part has a floor: what the parts before it leave is shared
among it and those after it, and a part for whose floor too little is left is not run. A part at its limit is ended
with all its processes. Results are JSON lines in DIR, written as soon as they are found, and what commands print is in
*.log beside them; a part that is run again replaces its own files. DIR/summary.json and DIR/summary.txt are written
anew after every part.

Exit status: 1 if a part failed or was cut off; 2 for wrong options; else 0, also if parts were skipped or not run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_headlines import headlines
from timed_parts import Job, Part, run_parts

from sltrain_dist.files import write_whole
from sltrain_dist.streams import replace_unprintable

REPO = Path(__file__).resolve().parents[1]
TOOLS = REPO / "tools"
PARTS = ("run", "layer", "1b", "7b", "130m", "planner", "quality")
MINUTES = 25.0
SHORTEST_MINUTES = 3.0
"""Enough for the part `run`, even if finding the device takes its whole minute."""


def tool(name: str, *options: str) -> tuple[str, ...]:
    """Returns the command of another tool, which writes its lines to `Job`'s FILE."""
    return sys.executable, str(TOOLS / f"{name}.py"), "--out", "FILE", *options


def tests(name: str, *selection: str) -> Job:
    """Returns a job that runs tests; their outcomes are written one by one."""
    options = ("-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider", "-p", "pytest_lines", "--lines", "FILE")
    return Job(f"tests-{name}", (sys.executable, "-m", "pytest", *options, *selection))


def make_parts(args: argparse.Namespace) -> list[Part]:
    """Returns all parts in their order. Shares and floors are those of the measurements, also in a rehearsal."""
    device = ("--device", args.device)
    where = (*device, "--rehearse") if args.rehearse else device

    def sized(measured: str, rehearsed: str) -> list[str]:
        return (rehearsed if args.rehearse else measured).split()

    def runs(name: str, *options: str) -> Job:
        return Job(f"runs-{name}", tool("gpu_runs", "--set", name, *where, *options))

    few = "--updates 2 --every 30"

    def models(name: str) -> tuple[Job]:
        return (runs(name, *sized("--updates 6", few)),)

    triton = "tests/gpu/test_triton_gpu.py"
    on_gpu = (
        tests("operator", "tests/gpu", f"--ignore={triton}"),
        tests("blocks", triton, "-k", "products_of_blocks"),
        tests("triton", triton, "-k", "not products_of_blocks"),
    )
    checks = (
        *((tests("all", "tests/gpu"),) if args.rehearse else on_gpu),  # without a GPU, all are skipped
        runs("engines", "--beside", *sized("", "--updates 2")),
        *(runs(name, "--beside", *sized("", few)) for name in ("ddp", "compiled", "fsdp", "zero")),
    )
    layer = tool("gpu_layer", *device, *sized("", "--shapes 60m --tokens 64 --repeats 1 --rate-size 256"))
    drawn = sized("--cuda --sample 40 --max-layers 4", "--sample 1 --max-layers 1")
    planner = (
        Job("planner", tool("gpu_planner", "DIR")),
        Job("planner-random", (sys.executable, str(TOOLS / "bench_planner.py"), "--rows", "FILE", *drawn)),
    )
    tokenizer = ("--tokenizer", args.tokenizer) if args.tokenizer else ()
    quality = tool("gpu_quality", *where, "--seconds", "LIMIT", *tokenizer, *sized("", "--updates 8 --vocab 320"))
    no_text = "" if args.text else "no --text was given"
    return [
        Part("environment", 0.5, 60, (Job("environment", tool("gpu_environment", *device)),)),
        Part("run", 6, 90, checks),
        Part("layer", 3, 60, (Job("layer", layer),)),
        Part("1b", 3, 60, models("1b")),
        Part("7b", 3.5, 90, models("7b")),
        Part("130m", 1.5, 40, models("130m")),
        Part("planner", 2, 30, planner),
        Part("quality", 5, 120, (Job("quality", (*quality, "--text", *(args.text or ()))),), skipped=no_text),
    ]


def describe(record: dict[str, Any]) -> str:
    """Returns a line about what became of a part."""
    if "jobs" not in record:
        return f"{record['part']}: {record['status']}: {record['reason']}"
    jobs = ", ".join(f"{job['lines']} lines in {job['file']}" for job in record["jobs"])
    return f"{record['part']}: {record['status']} after {record['seconds']} of {record['limit_s']} s: {jobs}"


def troubles(record: dict[str, Any]) -> list[str]:
    """Returns a line for every command of a part that failed or was cut off, with the last line that it printed."""
    return [
        f"{job['file']}: {'cut off' if job['cut_off'] else 'exit status ' + str(job['exit_status'])}: {job['printed']}"
        for job in record.get("jobs", ())
        if job["exit_status"]
    ]


def write_summary(out: Path, records: list[dict[str, Any]]) -> None:
    """Writes the summary of the parts so far, and prints the lines of the last one."""
    lines = []
    for record in records:
        found = headlines(record["part"], out) if "jobs" in record else []
        lines.append([describe(record), *(f"    {line}" for line in (*troubles(record), *found))])
        record["headlines"] = found
    write_whole(out / "summary.json", json.dumps({"parts": records}, indent=1))
    write_whole(out / "summary.txt", "".join(f"{line}\n" for part in lines for line in part))
    print("\n".join(lines[-1]), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for all parts; default: {MINUTES:g}")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which parts; default: all")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="C4-format *.json.gz files for the part quality")
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model; default: trained on --text")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--rehearse", action="store_true", help="the same parts, with tiny models")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.rehearse:
        parser.error("the CPU is only for rehearsals; add --rehearse")
    if not args.minutes >= SHORTEST_MINUTES:  # nor is it NaN
        parser.error(f"--minutes must be at least {SHORTEST_MINUTES:g}")
    for file in (*(args.text or ()), *([args.tokenizer] if args.tokenizer else ())):
        if not Path(file).is_file():
            parser.error(f"{file}: there is no such file")
    args.text = args.text and [str(Path(file).resolve()) for file in args.text]
    args.tokenizer = args.tokenizer and str(Path(args.tokenizer).resolve())
    return args


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of all commands: this checkout comes before installed packages."""
    path = os.pathsep.join([str(REPO), str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if args.device == "cpu" else {}
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **cpu}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; returns the exit status."""
    replace_unprintable()
    args = parse(arguments)
    # Ends the commands, too. Without a handler they would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in make_parts(args) if part.name in ("environment", *args.parts)]
    records: list[dict[str, Any]] = []

    def report(done: list[dict[str, Any]]) -> bool:
        records[:] = done
        write_summary(out, done)
        return done[0]["status"] == "done"  # without a device, nothing else can run

    run_parts(parts, out, 60 * args.minutes, environment_of(args), REPO, report)
    return int(any(record["status"] in ("failed", "cut off") for record in records))


if __name__ == "__main__":
    sys.exit(main())
