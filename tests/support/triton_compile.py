"""Compiles every kernel for compute capability 9.0, which needs no GPU, and checks the code.

A script, because Triton must not be in interpreter mode; run by tests/unit/sparse_lowrank/test_triton_kernels.py.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sltrain_dist.sparse_lowrank.kernels import triton_kernels as kernels

PRODUCTS = {"R": 171, "K": 168, "PRECISION": "ieee"}
INDEX = {"places": "*i32", "window_inputs": "*i32", "partial": "*fp32", "key": "*i64"}
ALIGNED = ("stride", "chunk")


def compiled(folder: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int = 4) -> str:
    function = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    scalars = ("tokens", "features", "stride", "windows", "shift", "m", "chunk", "first", "count", "n", "k")
    signature = {
        name: "constexpr" if name in constants else "i32" if name in scalars else INDEX.get(name, f"*{dtype}")
        for name in function.arg_names
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in ALIGNED
        },
    )
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(result.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " STACK:0 " in usage, f"{kernel} spills registers: {usage}"
    return result.asm["ptx"]


def main(folder: str) -> None:
    for dtype in ("bf16", "fp32"):
        small = dtype == "fp32"
        tile = {"BLOCK_T": 64 if small else 128, "BLOCK_R": 32 if small else 64, "BLOCK_K": 32 if small else 64}
        grad_tile = {"BLOCK_T": 32 if small else 64, "BLOCK_R": 64, "BLOCK_K": 64}
        ptx = [
            compiled(folder, kernels.outputs_kernel, dtype, {**PRODUCTS, **tile}),
            compiled(folder, kernels.inputs_kernel, dtype, {**PRODUCTS, **tile, "ADD": True}),
            compiled(folder, kernels.values_kernel, dtype, {**PRODUCTS, **grad_tile}),
        ]
        for code in ptx:
            assert small or re.search(r"wgmma\.mma_async", code), "a product is not on the tensor cores"
            assert re.search(r"(cp\.async\.cg\S*|ld\.global\.v4\S*)", code), "no access of 16 bytes"
        compiled(folder, kernels.transpose_kernel, dtype, {"BLOCK": 64})
        for twice in (False, True):
            places = {"K": 168, "GATHER": twice, "TWICE": twice, "BLOCK": 64}
            compiled(folder, kernels.transpose_back_kernel, dtype, places)
        for scatter in (False, True):
            compiled(folder, kernels.stratified_kernel, dtype, {"SCATTER": scatter, "BLOCK": 512})
    print("compiled")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(folder)
