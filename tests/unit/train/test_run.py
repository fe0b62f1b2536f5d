"""train/run.py: what becomes of errors that are none of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sltrain_dist.errors import ExitCode
from sltrain_dist.train.run import _explain, out_of_memory


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("fail", "what"),
    [
        (lambda: torch.empty(2**60), "the machine is out of memory (can't allocate memory: you tried to allocate"),
        (lambda: bytearray(2**62), "the machine is out of memory (MemoryError)"),
        (
            lambda: raise_(OSError(12, "Cannot allocate memory")),
            "the machine is out of memory ([Errno 12] Cannot allocate memory)",
        ),
        (lambda: raise_(torch.OutOfMemoryError("CUDA out of memory.\nTried")), "the device is out of memory (CUDA out"),
    ],
)
def test_memory_limits_get_the_same_advice_everywhere(fail: Callable[[], object], what: str) -> None:
    with pytest.raises(Exception, match=r".*") as caught:
        fail()
    code, reason = _explain(caught.value)
    assert code is ExitCode.CONFIG and reason.startswith(what)
    assert "lower train.micro_batch" in reason and "\n" not in reason


def test_other_errors_are_crashes() -> None:
    assert out_of_memory(RuntimeError("shape mismatch")) is None
    assert _explain(KeyError("x")) == (ExitCode.UNEXPECTED, "KeyError: 'x'")
