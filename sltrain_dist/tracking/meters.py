"""Throughput, model FLOP/s utilisation, peak memory and remaining time."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

Clock = Callable[[], float]


@dataclass(frozen=True)
class PeakFlops:
    """Peak rates of a device for dense matrix products, in FLOP/s (one multiply-add is two)."""

    bf16: float | None
    """Bfloat16 inputs, float32 accumulation. None: the device has no bfloat16 matrix units."""
    fp16: float
    """Float16 inputs, float32 accumulation."""
    fp32: float
    """Float32 inputs, on TF32 (or float32) matrix units where the device has them."""


def _tensor(half: float, single: float) -> PeakFlops:
    return PeakFlops(half * 1e12, half * 1e12, single * 1e12)


# From vendors' data sheets and architecture white papers: dense figures (half of those "with sparsity"); for consumer
# cards, the rate with float32 accumulation; for MI250X and MI250, per device as torch sees it, which is half a card.
# The first pattern found in the device name counts.
_PEAKS: tuple[tuple[str, PeakFlops], ...] = (
    (r"GB300", _tensor(2500, 1250)),
    (r"GB200", _tensor(2500, 1250)),
    (r"B300", _tensor(2250, 1125)),
    (r"B200", _tensor(2250, 1125)),
    (r"B100", _tensor(1750, 875)),
    (r"H200 NVL", _tensor(835.5, 417.5)),
    (r"GH200|H200", _tensor(989.4, 494.7)),
    (r"H100 NVL", _tensor(835.5, 417.5)),
    (r"H[18]00 PCIe", _tensor(756.5, 378)),
    (r"H[18]00", _tensor(989.4, 494.7)),
    (r"H20", _tensor(148, 74)),
    (r"A[18]00", _tensor(312, 156)),
    (r"A30", _tensor(165, 82.5)),
    (r"A40", _tensor(149.7, 74.8)),
    (r"A10G", _tensor(70, 35)),
    (r"A10", _tensor(125, 62.5)),
    (r"L40S", _tensor(362.05, 183)),
    (r"L40", _tensor(181.05, 90.5)),
    (r"L4", _tensor(121, 60)),
    (r"RTX 6000 Ada", _tensor(364.2, 182.1)),
    (r"RTX A6000", _tensor(154.8, 77.4)),
    (r"RTX A5000", _tensor(111.1, 55.6)),
    (r"RTX 5090", _tensor(209.5, 104.8)),
    (r"RTX 5080", _tensor(112.6, 56.3)),
    (r"RTX 4090", _tensor(165.2, 82.6)),
    (r"RTX 4080", _tensor(97.5, 48.7)),
    (r"RTX 3090 Ti", _tensor(80, 40)),
    (r"RTX 3090", _tensor(71, 35.6)),
    (r"RTX 3080", _tensor(59.5, 29.8)),
    (r"V100S", PeakFlops(None, 130e12, 16.4e12)),
    (r"V100.PCIE", PeakFlops(None, 112e12, 14e12)),
    (r"V100", PeakFlops(None, 125e12, 15.7e12)),
    (r"T4", PeakFlops(None, 65e12, 8.1e12)),
    (r"MI355X", _tensor(2516.6, 157.3)),
    (r"MI3(00|25)X", _tensor(1307.4, 653.7)),
    (r"MI300A", _tensor(980.6, 490.3)),
    (r"MI250X", _tensor(191.5, 47.9)),
    (r"MI250", _tensor(181.05, 45.3)),
    (r"MI210", _tensor(181, 45.3)),
    (r"MI100", PeakFlops(92.3e12, 184.6e12, 46.1e12)),
)


def peak_flops(device_name: str) -> PeakFlops | None:
    """Looks a device up by the name that its driver reports, such as "NVIDIA A100-SXM4-80GB".

    Returns:
        None for a device that is not in the table: CPUs, MIG slices (whose share of the peak is not in the
        name), laptop and cut-down variants.
    """
    if re.search(r"\b(MIG|Laptop|Max-Q|Mobile|D|SUPER)\b", device_name):
        return None
    for pattern, peak in _PEAKS:
        # "A10" must not match A100, and "L4" not L40.
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", device_name):
            return peak
    return None


def mfu(tokens_per_s: float, flops_per_token: float, peak: float | None) -> float | None:
    """Returns the model FLOP/s utilisation (PaLM, arXiv 2204.02311, appendix B), as a fraction of 1.

    Args:
        tokens_per_s: Throughput of all devices together.
        flops_per_token: FLOPs that the model itself needs, forward and backward, without recomputation.
        peak: FLOP/s of all devices together, or None if unknown.

    Returns:
        None if the peak is unknown.
    """
    return None if peak is None else tokens_per_s * flops_per_token / peak


def peak_memory_bytes() -> int:
    """Returns the peak memory of this process so far.

    Returns:
        With CUDA, the allocator's peak on the current device (tensors, not the context); else, and if torch has not
        initialized CUDA, the process's peak resident set size.
    """
    torch = sys.modules.get("torch")  # not imported, because this module must not load torch
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # Not ru_maxrss: on Linux it starts from the size of the launcher that started this process.
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@dataclass(frozen=True)
class Window:
    """Totals between two log lines."""

    tokens: int
    """Number of tokens trained on."""
    elapsed_s: float
    """Seconds of training, including waiting for data, excluding evaluation and checkpoints."""
    data_wait_s: float
    """Seconds of `elapsed_s` in which training waited for data."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second; 0 for an empty window."""
        return self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0


class Throughput:
    """Counts tokens and seconds of training.

    Args:
        clock: A monotonic clock, in seconds.
        total_s: Seconds of training in earlier processes of this run, if it was resumed.
    """

    def __init__(self, clock: Clock = time.perf_counter, total_s: float = 0.0) -> None:
        self._clock = clock
        self._total_s = total_s
        self._block: str | None = None
        self._reset(clock())

    def _reset(self, now: float) -> None:
        self._start = now
        self._tokens = 0
        self._seconds = {"waiting_for_data": 0.0, "excluded": 0.0}

    def add(self, tokens: int) -> None:
        """Counts the tokens of one update."""
        self._tokens += tokens

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """Counts the seconds of its block as waiting for data."""
        return self._measured("waiting_for_data")

    def excluded(self) -> AbstractContextManager[None]:
        """Excludes the seconds of its block, such as evaluation and checkpoints, from all totals."""
        return self._measured("excluded")

    @contextmanager
    def _measured(self, block: str) -> Iterator[None]:
        assert self._block is None, f"{block} inside {self._block}: the same seconds would count twice"
        self._block, start = block, self._clock()
        try:
            yield
        finally:
            self._block = None
            self._seconds[block] += self._clock() - start

    def window(self) -> Window:
        """Returns the totals since the last call, and starts a new window."""
        assert self._block is None, f"a window ends inside {self._block}"
        now = self._clock()
        elapsed_s = now - self._start - self._seconds["excluded"]
        window = Window(self._tokens, elapsed_s, self._seconds["waiting_for_data"])
        self._total_s += elapsed_s
        self._reset(now)
        return window

    @property
    def total_s(self) -> float:
        """Seconds of training in all finished windows and in earlier processes of the run."""
        return self._total_s


class Eta:
    """Estimates the remaining seconds from the mean pace since the first report.

    The first update is slow (compilation, cold caches), so the pace is measured from its end.
    Evaluation and checkpoints count, because they will recur.

    Args:
        total: Number of updates, or tokens, of the whole run.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, total: int, clock: Clock = time.perf_counter) -> None:
        self._total = total
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None

    def update(self, done: int) -> None:
        """Reports that `done` of `total` are done."""
        self._last = (self._clock(), done)
        self._first = self._first or self._last

    @property
    def seconds(self) -> float | None:
        """Seconds from the last report to the end. None before the second report."""
        if self._first is None or self._last is None or self._last[1] <= self._first[1]:
            return None
        seconds_each = (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
        return max(0.0, (self._total - self._last[1]) * seconds_each)
