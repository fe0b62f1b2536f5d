"""Compiles every kernel for an H100, which needs no GPU, and prints figures of the code, a line of JSON for each.

    python tests/support/triton_compile.py [--all]      --all: the products by every configuration of tuning

A script, because Triton must not be in interpreter mode; run by tests/unit/sparse_lowrank/test_triton_kernels.py.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sltrain_dist.optim.triton_step import low_bit_adam_kernel
from sltrain_dist.sparse_lowrank.kernels import torch_kernels as launchers
from sltrain_dist.sparse_lowrank.kernels import triton_kernels as kernels
from sltrain_dist.sparse_lowrank.sizes import ROW_ALIGNMENT, is_fused, num_windows, rows_are_aligned, values_per_row

LAYERS = {
    "130m q": (768, 768, 256, 0.03, ("bf16",)),
    "1b q": (2048, 2048, 512, 0.03, ("bf16",)),
    "1b gate": (5461, 2048, 512, 0.03, ("bf16", "fp32")),
    "1b down": (2048, 5461, 512, 0.03, ("bf16",)),
    "7b q": (4096, 4096, 1024, 0.05, ("bf16", "fp32")),
    "7b down": (4096, 11008, 1024, 0.05, ("bf16",)),
}
"""(m, n, rank, density, types)."""
TOKENS = 8192
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def launches(m: int, n: int, rank: int, density: float, dtype: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields the three products of a layer with the constants of their launches."""
    k, bits, of = values_per_row(n, density, "blocks"), 8 * TYPES[dtype].itemsize, TYPES[dtype]
    windows = num_windows(n, k)
    pitch = m if rows_are_aligned(m, bits) else -(-m // ROW_ALIGNMENT) * ROW_ALIGNMENT
    usual = {"K": k, "PRECISION": "ieee"}
    rank = rank if is_fused(m, rank, bits) else 0
    tile = dict(zip(("BLOCK_T", "BLOCK_O", "BLOCK_K"), launchers.outputs_tile(TOKENS, m, k, rank, of), strict=True))
    yield kernels.outputs_kernel, {**usual, "PITCH_H": 2 * rank, "RANK": rank, **tile}
    tile = dict(zip(TILE, launchers.inputs_tile(TOKENS, m, k, windows, of), strict=True))
    yield kernels.inputs_kernel, {**usual, "PITCH": pitch, "ADD": True, **tile}
    tile = dict(zip(TILE, launchers.values_plan(TOKENS, m, k, windows, of).tile, strict=True))
    yield kernels.values_kernel, {**usual, "PITCH": pitch, "R": launchers.longest_load(m, windows), **tile}


TILE = ("BLOCK_T", "BLOCK_R", "BLOCK_K")
INDEX = {"window_inputs": "*i32", "places": "*i32", "partial": "*fp32"}
SCALARS = ("tokens", "features", "pitch", "stride", "windows", "shift", "m", "n", "chunk", "first", "count", "k")
STRATIFIED = {"key": "*i64"}
ADAM = {
    **{f"{moment}_codes": "*u8" for moment in ("first", "second")},
    **{f"{moment}_table": "*u8" for moment in ("first", "second")},
    **{f"{moment}_{of}": "*fp32" for moment in ("first", "second") for of in ("scales", "levels", "borders")},
    **dict.fromkeys(("master", "shared"), "*fp32"),
    **dict.fromkeys(("width", "row_bytes", "per_row", "left", "start", "key"), "i32"),
    **dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "root_correction", "eps"), "fp32"),
    **dict.fromkeys(("rate", "decay_gradient", "keep"), "fp32"),
}  # fmt: skip


def compiled(
    folder: str,
    kernel: Any,
    dtype: str,
    constants: dict[str, Any],
    sizes: dict[str, int],
    warps: int,
    stages: int,
    types: dict[str, str] = INDEX,
    **options: Any,
) -> dict[str, Any]:
    """Compiles a kernel and returns its registers, spilled bytes, shared memory and instructions.

    `sizes` are the scalar arguments that are known to be multiples of 16 or not, as a launch finds out.
    """
    function = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32" if name in SCALARS else f"*{dtype}")
        for name in function.arg_names
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or (kind == "i32" and sizes.get(name, 1) % 16 == 0)
        },
    )
    options = {"num_warps": warps, "num_stages": stages, **options}
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(result.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    ptx = result.asm["ptx"]
    return {
        "warps": warps,
        "stages": stages,
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": result.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "async16": len(re.findall(r"cp\.async\.cg", ptx)),
        "async_narrow": len(re.findall(r"cp\.async\.ca", ptx)),
        "load16": len(re.findall(r"ld\.global\.v4", ptx)),
        "store16": len(re.findall(r"st\.global\.v4", ptx)),
        "store2": len(re.findall(r"st\.global\.b16", ptx)),
        "fma": len(re.findall(r"fma\.rn\.f32", ptx)),
        "approximate": len(re.findall(r"(?:div|sqrt|rcp|rsqrt)\.(?:full|approx)", ptx)),
    }


def products(folder: str, every: bool) -> Iterator[dict[str, Any]]:
    """Yields the figures of the products of all layers: by the first configuration of tuning, or by every one."""
    for layer, (m, n, rank, density, types) in LAYERS.items():
        for dtype in types:
            for kernel, constants in launches(m, n, rank, density, dtype):
                sizes = {"tokens": TOKENS, "stride": TOKENS, "m": m, "chunk": 256}
                for config in kernel.configs if every else kernel.configs[:1]:
                    how = config.num_warps, config.num_stages
                    result = compiled(folder, kernel, dtype, constants, sizes, *how)
                    yield {"layer": layer, "dtype": dtype, "kernel": kernel.fn.__name__, **result}


def passes(folder: str) -> Iterator[dict[str, Any]]:
    """Yields the figures of the other kernels; those that transpose, with rows of 2048 and of 5461 features."""
    for dtype in TYPES:
        for features in (2048, 5461):
            pitch = features if features % 8 == 0 else -(-features // ROW_ALIGNMENT) * ROW_ALIGNMENT
            sizes = {"tokens": TOKENS, "stride": TOKENS, "features": features, "pitch": pitch}
            for kernel, constants in (
                (kernels.transpose_kernel, {"BLOCK": 64}),
                (kernels.restore_kernel, {"K": 64, "TWICE": True, "BLOCK": 64}),
            ):
                result = compiled(folder, kernel, dtype, constants, sizes, 4, 1)
                yield {"features": features, "dtype": dtype, "kernel": kernel.fn.__name__, **result}
        for scatter in (False, True):
            constants = {"SCATTER": scatter, "BLOCK": 512}
            result = compiled(folder, kernels.stratified_kernel, dtype, constants, {}, 4, 3, STRATIFIED)
            yield {"dtype": dtype, "kernel": "stratified_kernel", **result}
    for bits, size, warps in ((8, 256, 2), (4, 128, 1)):
        constants = {"SIZE": size, "BITS": bits, "MASTER": False, "SHARED": False}
        constants |= {"DECAY_GRADIENT": False, "DECAY_VALUE": True, "STOCHASTIC": True}
        result = compiled(folder, low_bit_adam_kernel, "bf16", constants, {}, warps, 3, ADAM, enable_fp_fusion=False)
        yield {"dtype": f"bf16, {bits} bits", "kernel": "low_bit_adam_kernel", **result}


def main() -> None:
    with TemporaryDirectory() as folder:
        for each in itertools.chain(products(folder, every="--all" in sys.argv), passes(folder)):
            print(json.dumps(each))


if __name__ == "__main__":
    main()
