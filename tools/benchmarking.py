"""Functions that the benchmarks share: interleaved timing, peak memory, bytes saved for the backward pass."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler; read when torch is loaded

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sltrain_dist.config import presets

Run = Callable[[], Any]


def sizes() -> list[str]:
    """Returns the short names of the presets: 60m, 130m, …"""
    return [name.removeprefix("llama_") for name in presets.PRESETS]


def some_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Returns a type for argparse: a comma-separated list of `choices`, without duplicates."""
    known = list(choices)

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, unknown))}; choose from {', '.join(known)}")
        return names

    return parse


def positive(text: str) -> int:
    """Parses a positive whole number, as a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number above 0")
    return int(text)


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how is measured, and how the result is printed: --threads, --cpu-time and --json."""
    parser.add_argument("--threads", type=positive, default=None)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a shared machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def device_name(kind: str) -> str:
    """Returns what a report calls a device of a kind, "cpu" or "cuda"."""
    return torch.cuda.get_device_name() if kind == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def conditions(kind: str, *, cpu_time: bool) -> dict[str, Any]:
    """Returns what a report says of the conditions of its measurements, on a device of a kind, "cpu" or "cuda"."""
    return {
        "device": device_name(kind),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "clock": "cpu" if cpu_time else "wall",
    }


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Seconds:
    """Duration of a run: wall-clock time, and processor time over all threads."""

    wall: float
    cpu: float


def interleaved(
    runs: Mapping[str, Run], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[Seconds]]:
    """Times every repetition of every run. Runs take turns, so that slow periods of the machine affect all of them."""
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    for repetition in range(warm_up + repeats):
        for name, run in runs.items():
            synchronise(device)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            synchronise(device)
            if repetition >= warm_up:
                times[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return times


def median_times(
    runs: Mapping[str, Run], repeats: int, device: torch.device, warm_up: int = 1, *, cpu_time: bool = False
) -> dict[str, float]:
    """Returns the median seconds of every run, see :func:`interleaved`.

    With `cpu_time` they are processor seconds, for single-threaded runs on a shared machine.
    """
    times = interleaved(runs, repeats, device, warm_up)
    return {name: statistics.median(s.cpu if cpu_time else s.wall for s in seconds) for name, seconds in times.items()}


def peak_bytes(run: Run, device: torch.device) -> int:
    """Returns the peak bytes that torch allocates during the run, beyond those allocated before.

    Scratch memory of the matrix libraries is not allocated by torch, and not counted.
    """
    activities = [ProfilerActivity.CPU]
    with _without_stderr(), profile(activities=activities, profile_memory=True) as profiler:
        run()
        synchronise(device)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    wanted = {"cpu": 0, "cuda": 1}[device.type]
    changes = [(e.start_ns(), e.nbytes()) for e in events if int(e.device_type().value) == wanted]
    peak = allocated = 0
    for _, change in sorted(changes, key=lambda at_and_bytes: at_and_bytes[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Hides the output that the profiler's library writes at every start and stop."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def saved_bytes(run: Run, parameters: list[Tensor]) -> int:
    """Returns the bytes that autograd saves for the backward pass of `run`, without those of the parameters."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(size for pointer, size in saved.items() if pointer not in known)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Formats a table in Markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
