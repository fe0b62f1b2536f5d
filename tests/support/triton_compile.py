"""Compiles every kernel for an H100, which needs no GPU, and prints figures of the code, a line of JSON for each.

A script, because Triton must not be in interpreter mode; run by tests/unit/sparse_lowrank/test_triton_kernels.py.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sltrain_dist.optim.triton_step import low_bit_adam_kernel
from sltrain_dist.sparse_lowrank.kernels import triton_kernels as kernels

PRODUCTS = {"R": 171, "K": 168, "PRECISION": "ieee"}
INDEX = {"places": "*i32", "window_inputs": "*i32", "partial": "*fp32", "key": "*i64"}
SCALARS = ("tokens", "features", "stride", "windows", "shift", "m", "chunk", "first", "count", "n", "k")
ALIGNED = ("stride", "chunk")
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
    types: dict[str, str] = INDEX,
    warps: int = 4,
    **options: Any,
) -> dict[str, Any]:
    """Compiles a kernel and returns its registers, spilled bytes, shared memory and instructions."""
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
            if kind.startswith("*") or name in ALIGNED
        },
    )
    options = {"num_warps": warps, "num_stages": 3, **options}
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(result.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    ptx = result.asm["ptx"]
    return {
        "warps": warps,
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


def main(folder: str) -> None:
    for dtype in ("bf16", "fp32"):
        small = dtype == "fp32"
        tile = {"BLOCK_T": 64 if small else 128, "BLOCK_R": 32 if small else 64, "BLOCK_K": 32 if small else 64}
        grad_tile = {"BLOCK_T": 32 if small else 64, "BLOCK_R": 64, "BLOCK_K": 64}
        launches = [
            (kernels.outputs_kernel, {**PRODUCTS, **tile}),
            (kernels.inputs_kernel, {**PRODUCTS, **tile, "ADD": True}),
            (kernels.values_kernel, {**PRODUCTS, **grad_tile}),
            (kernels.transpose_kernel, {"BLOCK": 64}),
            *(
                (kernels.transpose_back_kernel, {"K": 168, "GATHER": twice, "TWICE": twice, "BLOCK": 64})
                for twice in (False, True)
            ),
            *((kernels.stratified_kernel, {"SCATTER": scatter, "BLOCK": 512}) for scatter in (False, True)),
        ]
        for kernel, constants in launches:
            name = getattr(kernel, "fn", kernel).__name__
            print(json.dumps({"kernel": name, "dtype": dtype, **compiled(folder, kernel, dtype, constants)}))
    for bits, size, warps in ((8, 256, 2), (4, 128, 1)):
        constants = {"SIZE": size, "BITS": bits, "MASTER": False, "SHARED": False}
        constants |= {"DECAY_GRADIENT": False, "DECAY_VALUE": True, "STOCHASTIC": True}
        figures = compiled(folder, low_bit_adam_kernel, "bf16", constants, ADAM, warps, enable_fp_fusion=False)
        print(json.dumps({"kernel": "low_bit_adam_kernel", "dtype": f"bf16, {bits} bits", **figures}))


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(folder)
