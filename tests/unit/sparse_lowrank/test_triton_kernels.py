"""The Triton kernels in Triton's interpreter, and that they compile for an H100, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sltrain_dist.sparse_lowrank.kernels import torch_kernels as kernels
from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport
from tests.support.paths import REPO

SUPPORT = REPO / "tests" / "support"


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
    out = run_apart("-m", "pytest", "-q", "-p", "no:cacheprovider", SUPPORT / "triton_cases.py", TRITON_INTERPRET="1")
    assert " passed" in out and "skipped" not in out


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_spilling(tmp_path: Path) -> None:
    out = run_apart(SUPPORT / "triton_compile.py", TRITON_CACHE_DIR=str(tmp_path))
    assert out.split()[-1] == "compiled"


def test_cuda_without_triton_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICES", ["cpu"])
    monkeypatch.setattr(kernels, "HAVE_TRITON", False)
    kernels._warn_without_triton.cache_clear()
    x = torch.ones(3, 8)
    support = BlockSupport(4, 8, 0.5)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert support.products(x) is support
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert support.products(x) is support


def test_only_cuda_and_the_types_of_the_kernels() -> None:
    x = torch.ones(3, 8, device="meta")
    assert not kernels.use_kernels(torch.ones(3, 8)) and not kernels.use_kernels(x)
