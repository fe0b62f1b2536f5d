"""Throughput, MFU, peak memory and ETA, with a clock that the test turns."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from sltrain_dist.tracking.meters import Eta, Throughput, Window, mfu, peak_flops, peak_memory_bytes


class HandClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


class TestThroughput:
    def test_window(self, clock: HandClock) -> None:
        meter = Throughput(clock)
        for _ in range(3):
            with meter.waiting_for_data():
                clock.now += 0.5
            clock.now += 2.0
            meter.add(100)
        assert meter.window() == Window(tokens=300, elapsed_s=7.5, data_wait_s=1.5)

    def test_windows_are_independent_and_total_up(self, clock: HandClock) -> None:
        meter = Throughput(clock, total_s=50.0)
        meter.add(10)
        clock.now += 4.0
        first = meter.window()
        meter.add(5)
        clock.now += 1.0
        second = meter.window()
        assert (first.tokens, first.elapsed_s, first.tokens_per_s) == (10, 4.0, 2.5)
        assert (second.tokens, second.elapsed_s, second.tokens_per_s) == (5, 1.0, 5.0)
        assert meter.total_s == 55.0

    def test_evaluation_and_checkpoints_are_left_out(self, clock: HandClock) -> None:
        meter = Throughput(clock)
        clock.now += 2.0
        meter.add(8)
        with meter.excluded():
            clock.now += 100.0
        with pytest.raises(KeyboardInterrupt), meter.excluded():
            clock.now += 100.0
            raise KeyboardInterrupt
        clock.now += 2.0
        assert meter.window() == Window(tokens=8, elapsed_s=4.0, data_wait_s=0.0)
        assert meter.total_s == 4.0

    def test_empty_window(self, clock: HandClock) -> None:
        assert Throughput(clock).window().tokens_per_s == 0.0

    def test_misuse_is_refused(self, clock: HandClock) -> None:
        meter = Throughput(clock)
        with meter.excluded():
            with pytest.raises(AssertionError, match="waiting_for_data inside excluded"), meter.waiting_for_data():
                pass
            with pytest.raises(AssertionError, match="inside excluded"):
                meter.window()


class TestEta:
    def test_pace_without_the_first_update(self, clock: HandClock) -> None:
        eta = Eta(100, clock)
        assert eta.seconds is None
        clock.now += 60.0  # compiles
        eta.update(1)
        assert eta.seconds is None
        clock.now += 30.0
        eta.update(11)
        assert eta.seconds == pytest.approx(89 * 3.0)

    def test_resumed_run_does_not_count_what_others_did(self, clock: HandClock) -> None:
        eta = Eta(1000, clock)
        eta.update(501)
        clock.now += 10.0
        eta.update(511)
        assert eta.seconds == pytest.approx(489.0)

    def test_never_negative(self, clock: HandClock) -> None:
        eta = Eta(10, clock)
        eta.update(5)
        clock.now += 1.0
        eta.update(12)  # a run by tokens overshoots
        assert eta.seconds == 0.0


class TestPeakFlops:
    @pytest.mark.parametrize(
        ("name", "bf16", "fp32"),
        [
            ("NVIDIA A100-SXM4-80GB", 312, 156),
            ("NVIDIA A100-PCIE-40GB", 312, 156),
            ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
            ("NVIDIA H100 PCIe", 756.5, 378),
            ("NVIDIA H100 NVL", 835.5, 417.5),
            ("NVIDIA H200", 989.4, 494.7),
            ("NVIDIA H200 NVL", 835.5, 417.5),
            ("NVIDIA GH200 480GB", 989.4, 494.7),
            ("NVIDIA B200", 2250, 1125),
            ("NVIDIA GB200", 2500, 1250),
            ("NVIDIA L4", 121, 60),
            ("NVIDIA L40", 181.05, 90.5),
            ("NVIDIA L40S", 362.05, 183),
            ("NVIDIA A10", 125, 62.5),
            ("NVIDIA A10G", 70, 35),
            ("NVIDIA RTX A6000", 154.8, 77.4),
            ("NVIDIA RTX 6000 Ada Generation", 364.2, 182.1),
            ("NVIDIA GeForce RTX 3090", 71, 35.6),
            ("NVIDIA GeForce RTX 3090 Ti", 80, 40),
            ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
            ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
            ("AMD Instinct MI250X", 191.5, 47.9),
            ("AMD Instinct MI300X", 1307.4, 653.7),
        ],
    )
    def test_known(self, name: str, bf16: float, fp32: float) -> None:
        peak = peak_flops(name)
        assert peak is not None
        assert peak.bf16 == peak.fp16 == pytest.approx(bf16 * 1e12)
        assert peak.fp32 == pytest.approx(fp32 * 1e12)

    @pytest.mark.parametrize(
        ("name", "fp16", "fp32"),
        [("Tesla V100-SXM2-32GB", 125, 15.7), ("Tesla V100-PCIE-16GB", 112, 14), ("Tesla T4", 65, 8.1)],
    )
    def test_without_bfloat16(self, name: str, fp16: float, fp32: float) -> None:
        peak = peak_flops(name)
        assert peak is not None
        assert peak.bf16 is None
        assert (peak.fp16, peak.fp32) == (pytest.approx(fp16 * 1e12), pytest.approx(fp32 * 1e12))

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "cpu",
            "Intel(R) Xeon(R) Platinum 8480+",
            "NVIDIA A1000",
            "NVIDIA GH100",
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 4080 SUPER",
            "NVIDIA GeForce GTX 1080 Ti",
        ],
    )
    def test_unknown(self, name: str) -> None:
        assert peak_flops(name) is None

    def test_mfu(self) -> None:
        # 60 % of a peak of 312 TFLOP/s at 1 GFLOP a token is 187,200 tokens/s.
        assert mfu(187_200, 1e9, 312e12) == pytest.approx(0.6)
        assert mfu(187_200, 1e9, 2 * 312e12) == pytest.approx(0.3)
        assert mfu(187_200, 1e9, None) is None


class TestPeakMemory:
    def test_remembers(self) -> None:
        before = peak_memory_bytes()
        block = np.ones(64 << 20, dtype=np.uint8)
        during = peak_memory_bytes()
        assert during >= max(before, block.nbytes)
        del block
        assert peak_memory_bytes() > during - (1 << 20)  # the kernel's counts are a few pages late

    def test_bytes_of_this_process_alone(self) -> None:
        ballast = np.ones(400 << 20, dtype=np.uint8)  # ru_maxrss of the child would begin with it
        code = (
            "import sys; from sltrain_dist.tracking.meters import peak_memory_bytes as peak\n"
            "a = peak(); b = bytearray(b'x') * (200 << 20); print(a, peak() - a, 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        start, rise, torch_loaded = done.stdout.split()
        assert 1 << 20 < int(start) < ballast.nbytes / 2
        assert int(rise) == pytest.approx(200 << 20, rel=0.01)
        assert torch_loaded == "False"

    def test_cuda_counts_the_allocator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Cuda:
            is_initialized = staticmethod(lambda: True)
            max_memory_allocated = staticmethod(lambda: 123)

        monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": Cuda}))  # type: ignore[arg-type]
        assert peak_memory_bytes() == 123


def test_rates_are_finite() -> None:
    assert math.isfinite(Window(tokens=5, elapsed_s=0.0, data_wait_s=0.0).tokens_per_s)
