"""The package's public names: all are there, each is imported on first use, and planning from Python needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sltrain_dist
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.sparse_lowrank.layer import SLLinear
from tests.support.paths import REPO


def test_public_names_are_what_they_say() -> None:
    assert all(getattr(sltrain_dist, name).__name__ for name in sltrain_dist.__all__)
    assert sltrain_dist.SLLinear is SLLinear and sltrain_dist.estimate_memory is estimate
    with pytest.raises(AttributeError, match="no attribute 'SLLiner'"):
        _ = sltrain_dist.SLLiner


def test_planning_from_python_needs_no_torch() -> None:
    code = (
        "import sys; from sltrain_dist import Config, estimate_memory, load_config;"
        "config = load_config('configs/llama_60m.yaml'); assert isinstance(config, Config);"
        "assert callable(estimate_memory); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0
