"""Compiles every kernel for an H100, which needs no GPU, and prints figures of the code, a line of JSON for each.

    python tests/support/triton_compile.py [--all]      --all: every configuration that tuning chooses from

A script, because Triton must not be in interpreter mode; run by tests/unit/sparse_lowrank/test_triton_kernels.py.
"""

from __future__ import annotations

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
from sltrain_dist.sparse_lowrank.sizes import FUSED_RANK, num_windows, run_unit, values_per_row, window_step

LAYERS = {
    "1b q": (2048, 2048, 512, 0.03),
    "1b gate": (5461, 2048, 512, 0.03),
    "1b down": (2048, 5461, 512, 0.03),
    "7b q": (4096, 4096, 1024, 0.05),
    "7b gate": (11008, 4096, 1024, 0.05),
    "7b down": (4096, 11008, 1024, 0.05),
}
"""(m, n, rank, density)."""
TOKENS = 8192
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def row(columns: int) -> int:
    """Returns the elements from one row to the next, as aligned_rows makes them."""
    return columns if columns % 8 == 0 else -(-columns // 16) * 16


def launches(m: int, n: int, rank: int, density: float, dtype: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yields the three kernels of a layer with the constants of their launches."""
    k = values_per_row(n, density, "blocks")
    windows = num_windows(n, k)
    group = window_step(n, k)
    usual = {"K": k, "GROUP": group, "UNIT": run_unit(m, windows), "PRECISION": "ieee"}
    fused = rank <= FUSED_RANK
    low_rank = {"RANK": rank if fused else 0, "ADD": not fused}
    x = torch.empty(TOKENS, 0, dtype=TYPES[dtype], device="meta")
    for name, kernel, features, summed, own in (
        ("outputs", kernels.outputs_kernel, m, max(k, rank), {"PITCH_X": row(n), "PITCH_H": rank, "PITCH_Y": m}),
        (
            "inputs", kernels.inputs_kernel, n, max(-(-m // windows), rank),
            {"PITCH_G": row(m), "PITCH_Q": rank, "PITCH_A": row(n), "PITCH_X": n},
        ),
    ):  # fmt: skip
        block_t, block, block_k = launchers._tiles(x, features, summed)
        tile = {"BLOCK_T": block_t, "BLOCK_O" if name == "outputs" else "BLOCK_C": block, "BLOCK_K": block_k}
        yield name, kernel, {**usual, **low_rank, **own, **tile}
    plan = launchers.values_plan(TOKENS, m, k, windows, TYPES[dtype])
    tile = dict(zip(("BLOCK_T", "BLOCK_R", "BLOCK_K"), plan.block, strict=True))
    yield "values", kernels.values_kernel, {**usual, "PITCH_G": row(m), "PITCH_X": row(n), "R": plan.run, **tile}


INDEX = {"window_inputs": "*i32", "partial": "*fp32"}
SCALARS = ("tokens", "windows", "shift", "m", "n", "chunk", "first", "count", "k")
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


def figures(folder: str, every: bool) -> Iterator[dict[str, Any]]:
    """Yields the figures of the kernels of all layers: by the first configuration of tuning, or by every one."""
    for layer, shape in LAYERS.items():
        for dtype in TYPES:
            for name, kernel, constants in launches(*shape, dtype):
                sizes = {"tokens": TOKENS, "m": shape[0], "n": shape[1], "chunk": 256}
                for config in kernel.configs if every else kernel.configs[:1]:
                    how = config.num_warps, config.num_stages
                    result = compiled(folder, kernel, dtype, constants, sizes, *how)
                    yield {"layer": layer, "dtype": dtype, "kernel": name, **result}


def main() -> None:
    with TemporaryDirectory() as folder:
        for each in figures(folder, every="--all" in sys.argv):
            print(json.dumps(each))
        for dtype in TYPES:
            for scatter in (False, True):
                constants = {"SCATTER": scatter, "BLOCK": 512}
                print(json.dumps(compiled(folder, kernels.stratified_kernel, dtype, constants, {}, 4, 3, STRATIFIED)))
        for bits, size, warps in ((8, 256, 2), (4, 128, 1)):
            constants = {"SIZE": size, "BITS": bits, "MASTER": False, "SHARED": False}
            constants |= {"DECAY_GRADIENT": False, "DECAY_VALUE": True, "STOCHASTIC": True}
            how = {"enable_fp_fusion": False}
            result = compiled(folder, low_bit_adam_kernel, "bf16", constants, {}, warps, 3, ADAM, **how)
            print(json.dumps({"step of Adam": bits, **result}))


if __name__ == "__main__":
    main()
