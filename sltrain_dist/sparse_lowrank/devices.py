"""What the cost model knows of devices (no torch): rates of arithmetic and of memory, and the time of a launch.

GPUs: the peak rates are those of the vendors' data sheets. Programs reach a share of them that is measured on an H200
(docs/reports/2026-11-27-h200.md) and assumed on the other GPUs, on which nothing has been measured.

CPUs: a thread's rates, fitted to measurements of one machine whose instruction sets were limited
(docs/reports/2026-11-27-cost-model.md). Several threads are taken to divide all times alike, so that a route does not
depend on their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Unit = Literal["matrix", "unaligned", "blocks", "fused", "bags", "dots", "copy", "transpose", "pick"]
"""What runs a kernel.

- matrix: matrix products. unaligned: those on a GPU with rows that do not begin at multiples of 16 bytes.
- blocks: products with the blocks of the support `blocks`. fused: the same and a low-rank product in one kernel, on a
  GPU.
- bags, dots: weighted sums of scattered rows, and dot products of pairs of them.
- copy: passes in order, and accesses to scattered values, of which each moves a sector.
- transpose: torch's copies of the transpose of a few tokens, which stay in the cache. pick: those of all tokens, and
  gathers along the features of every token.
"""

UNLIMITED = float("inf")


class Rate(NamedTuple):
    """FLOP/s and bytes per second that the kernels of one unit reach with one type."""

    flops: float
    bandwidth: float


@dataclass(frozen=True, eq=False)
class Device:
    """A kind of device.

    Attributes:
        name: Its key in :data:`CPUS` or :data:`GPUS`.
        is_cpu: Whether torch's operators for CPUs run, instead of CUDA's and the Triton kernels.
        sector_bytes: Bytes that the memory moves for one scattered value.
        launch_s: Seconds that starting a kernel takes.
        rates: Rates of every unit with types of 16 bits, and with wider ones.
    """

    name: str
    is_cpu: bool
    sector_bytes: int
    launch_s: float
    rates: Mapping[Unit, tuple[Rate, Rate]]

    def rate(self, unit: Unit, bits: int) -> Rate:
        """Returns the rate of a unit with a type of so many bits."""
        return self.rates[unit][0 if bits <= 16 else 1]


def _gpu(name: str, bf16: float, fp32: float, bandwidth: float) -> Device:
    """Returns a GPU from its data sheet.

    Args:
        name: Its key in :data:`GPUS`.
        bf16: Dense TFLOP/s of bfloat16 matrix products that are summed in float32.
        fp32: TFLOP/s of float32 without TF32.
        bandwidth: TB/s of the memory.
    """
    # Shares on an H200, from roofline.json and kernels.json of its report. Products: 770 to 800 TFLOP/s of 989 (bf16)
    # and 49 of 67 (fp32). Copies: 4.0 to 4.2 TB/s of 4.8. Unaligned products: 80 to 150 TFLOP/s. Three earlier kernels
    # of `blocks` on layers of 7B: 184 to 290 TFLOP/s. The share of those that include a low-rank product is assumed, as
    # are both shares in float32, without tensor cores. torch's transposes: 0.6 TB/s. Gathers along features: 0.7 to
    # 1.0 TB/s.
    peak = {16: 0.80 * bf16 * 1e12, 32: 0.73 * fp32 * 1e12}
    memory = 0.86 * bandwidth * 1e12

    def rates(flops: float, share: float = 1.0, *, single: float | None = None) -> tuple[Rate, Rate]:
        return (
            Rate(flops * peak[16], share * memory),
            Rate((flops if single is None else single) * peak[32], share * memory),
        )

    return Device(
        name,
        is_cpu=False,
        sector_bytes=32,
        # What a busy GPU does not hide of launches. 1B on an H200: full rank took 0.402 s, `blocks` by materialize
        # 0.454 s, with 7,600 launches more, whose kernels took 10 ms. A launch by itself took 10.9 µs.
        launch_s=5e-6,
        rates={
            "matrix": rates(1),
            "unaligned": rates(0.16, single=1),
            "blocks": rates(0.28),
            "fused": rates(0.5),
            "bags": rates(UNLIMITED),
            "dots": rates(UNLIMITED),
            "copy": rates(UNLIMITED),
            "transpose": rates(UNLIMITED, 0.15),
            "pick": rates(UNLIMITED, 0.22),
        },
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        # Data sheets: "NVIDIA H200 Tensor Core GPU" (SXM), "NVIDIA H100 Tensor Core GPU" (SXM, PCIe, NVL), "NVIDIA A100
        # Tensor Core GPU" (80GB SXM; 80GB PCIe has 1.935 TB/s; 40GB). RTX: the white papers of the architectures Ada
        # and GA102, which state bfloat16 with float32 sums. All without sparsity.
        _gpu("H200", 989.4, 66.9, 4.8),
        _gpu("H100", 989.4, 66.9, 3.35),
        _gpu("H100 PCIe", 756.5, 51.2, 2.0),
        _gpu("H100 NVL", 835.5, 60, 3.9),
        _gpu("A100", 312, 19.5, 2.039),
        _gpu("A100 40GB", 312, 19.5, 1.555),
        _gpu("RTX 4090", 165.2, 82.6, 1.008),
        _gpu("RTX 3090", 71, 35.6, 0.936),
    )
}
"""GPUs by name."""

ROUTE_GPU = GPUS["H200"]
"""The GPU by which routes are chosen on every GPU, so that a plan and its run agree, and ranks or resumed runs on other
GPUs do, too. It is the one that was measured. By the model, that costs a decoder layer of the presets with `blocks` in
bf16 0.2 % of its time on average on an A100, H100 (SXM) or RTX 4090, and 4 % at most (12 % on an H100 PCIe, 6 % on an
RTX 3090)."""


def _cpu(name: str, matrix: tuple[float, float], blocks: tuple[float, float]) -> Device:
    """Returns a CPU. On the machine that was measured, the speed of passes hardly depends on the instruction set.

    Args:
        name: The instruction set.
        matrix: GFLOP/s of a thread's matrix products in bfloat16, and in float32.
        blocks: Largest GFLOP/s of products with the blocks of `blocks`.
    """

    def rates(bandwidth: tuple[float, float], flops: tuple[float, float] | None = None) -> tuple[Rate, Rate]:
        of16, of32 = flops or (UNLIMITED, UNLIMITED)
        return Rate(of16 * 1e9, bandwidth[0] * 1e9), Rate(of32 * 1e9, bandwidth[1] * 1e9)

    return Device(
        name,
        is_cpu=True,
        sector_bytes=64,  # a line of the cache
        launch_s=4e-6,  # an operator of torch
        rates={
            "matrix": rates((10, 10), matrix),
            "unaligned": rates((10, 10), matrix),
            "blocks": rates((5.3, 3.8), blocks),
            "fused": rates((5.3, 3.8), blocks),
            "bags": rates((35, 48)),
            "dots": rates((15, 40)),
            "copy": rates((10, 10)),
            "transpose": rates((3.2, 4.3)),
            "pick": rates((1.6, 4.8)),
        },
    )


CPUS = {
    cpu.name: cpu
    for cpu in (
        _cpu("AMX", (700, 160), blocks=(160, 90)),
        _cpu("AVX512", (85, 160), blocks=(85, 90)),
        # oneDNN has no fast products of 16-bit types without AVX-512.
        _cpu("AVX2", (3, 78), blocks=(3, 78)),
    )
}
"""CPUs by the widest instruction set that torch uses."""


def find_cpu(capability: str, *, amx: bool) -> Device:
    """Returns a CPU by `torch.backends.cpu.get_cpu_capability()`, and by whether it has AMX.

    Capabilities of other architectures count as AVX2.
    """
    if capability == "AVX512":
        return CPUS["AMX" if amx else "AVX512"]
    return CPUS["AVX2"]
