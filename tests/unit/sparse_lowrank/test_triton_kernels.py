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
    """The tensor cores multiply, accesses are of 16 bytes, and no register is spilled."""
    out = run_apart(SUPPORT / "triton_compile.py", TRITON_CACHE_DIR=str(tmp_path))
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 2 * 8 + 2
    for row in rows:
        assert row["stack"] == 0 and row["shared"] <= SHARED_MEMORY
        if row["kernel"] in ("outputs_kernel", "inputs_kernel", "values_kernel"):
            assert (row["wgmma"] > 0) == (row["dtype"] == "bf16")
            assert row["async16"] + row["load16"] > 0
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
