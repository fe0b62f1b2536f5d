"""Shared fixtures."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from tests.support.paths import REPO


def pytest_configure() -> None:
    """One thread for each process, also for those that tests start: with models so small, more wait for each other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is there before the first test stays. Replays collect garbage often, and need not look at all that."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and tokenizers beside the checkout, where they are there."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return path
