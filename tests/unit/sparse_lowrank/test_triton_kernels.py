"""The Triton kernels in Triton's interpreter, and that they compile for an H100, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sltrain_dist.numerics import gpu_kernels as kernels
from tests.support.paths import REPO

SUPPORT = REPO / "tests" / "support"
SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a block of an H100 may use (CUDA C++ Programming Guide, compute capability 9.0)."""


def run_apart(*arguments: str | Path, **environment: str) -> str:
    """Triton reads TRITON_INTERPRET when it is imported, so that each mode needs a process of its own."""
    pytest.importorskip("triton")
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=REPO, env={**inherited, **environment},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    cases = [SUPPORT / "triton_cases.py", SUPPORT / "triton_adam_cases.py"]
    out = run_apart("-m", "pytest", "-q", "-p", "no:cacheprovider", *cases, TRITON_INTERPRET="1")
    assert " passed" in out and "skipped" not in out


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """For layers of 130M, 1B and 7B: the tensor cores multiply, accesses are of 16 bytes, and no register is spilled.

    Narrow copies are those of window_inputs, and narrow stores those to rows of 5461 outputs, which are not aligned.
    Products are those of Hopper (wgmma), except for runs below 64 outputs: its smallest tile is longer.
    """
    out = run_apart(SUPPORT / "triton_compile.py", TRITON_CACHE_DIR=str(tmp_path))
    rows = [json.loads(line) for line in out.splitlines()]
    products = [row for row in rows if "layer" in row]
    assert len(products) == 8 * 3 and len(rows) == 8 * 3 + 2 * (2 * 2 + 2) + 2
    for row in rows:
        assert row["stack"] == 0, f"registers are spilled: {row}"
        assert row["shared"] <= SHARED_MEMORY
    for row in products:
        assert row["async16"] > 0
        if row["dtype"] == "bf16":
            short = row["layer"] == "130m q" and row["kernel"] == "values_kernel"
            assert (row["wgmma"] > 0, row["mma"] > 0) == (not short, short)
            assert row["async_narrow"] <= 3
            is_narrow = row["layer"] == "1b gate" and row["kernel"] == "outputs_kernel"
            assert is_narrow or (row["store2"] == 0 and row["store16"] > 0)
        else:
            assert row["wgmma"] == row["mma"] == 0 and row["fma"] > 0
    for row in rows[-2:]:  # steps of Adam, whose operations must each be rounded by itself
        assert row["fma"] == row["approximate"] == 0


def test_cuda_without_triton_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICES", ["cpu"])
    monkeypatch.setattr(kernels, "HAVE_TRITON", False)
    kernels._warn_without_triton.cache_clear()
    x = torch.ones(3, 8)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert not kernels.use_kernels(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.use_kernels(x)


def test_only_cuda_and_the_types_of_the_kernels() -> None:
    x = torch.ones(3, 8, device="meta")
    assert not kernels.use_kernels(torch.ones(3, 8)) and not kernels.use_kernels(x)
