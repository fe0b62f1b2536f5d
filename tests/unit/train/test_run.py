"""train/run.py: what becomes of errors that are none of ours, and who reports an error of the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sltrain_dist.errors import ExitCode
from sltrain_dist.train.run import _explain, out_of_memory
from sltrain_dist.train.run_directory import Outcome, RunDirectory

MISTAKE = "train.micro_batch=0"
FAILING_RANK = f"""
import sys
from sltrain_dist.train import run
run._PATIENCE_S = float(sys.argv[3])
run.pretrain(sys.argv[1], [sys.argv[2], "{MISTAKE}"])
"""


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


class TestErrorOfTheStart:
    """A launcher ends all ranks when it sees the first end, so the main rank might not come to its report."""

    @staticmethod
    def second_rank(run_dir: Path, patience_s: float) -> subprocess.Popen[str]:
        config = run_dir / "config.yaml"
        config.write_text("seed: 1\n")
        return subprocess.Popen(
            [sys.executable, "-c", FAILING_RANK, str(config), f"run_dir={run_dir}", str(patience_s)],
            env={**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_another_rank_gives_the_main_one_time(self, tmp_path: Path) -> None:
        with self.second_rank(tmp_path, 3600.0) as process:
            time.sleep(2.0)
            assert process.poll() is None
            process.terminate()
            assert process.communicate()[1] == ""
        assert not (tmp_path / "exit.json").exists()

    def test_then_it_reports_its_own(self, tmp_path: Path) -> None:
        with self.second_rank(tmp_path, 0.0) as process:
            error = process.communicate()[1]
        assert process.returncode == int(ExitCode.CONFIG)
        assert error.count("error: ") == 1 and "train.micro_batch" in error
        assert f"error: {json.loads((tmp_path / 'exit.json').read_text())['reason']}\n" == error

    def test_but_not_what_the_main_rank_has_reported(self, tmp_path: Path) -> None:
        with self.second_rank(tmp_path, 0.0) as process:
            reason = process.communicate()[1].removeprefix("error: ").removesuffix("\n")
        RunDirectory(tmp_path).write_failed_start(Outcome(ExitCode.CONFIG, reason, 0))
        with self.second_rank(tmp_path, 0.0) as process:
            assert process.communicate()[1] == ""
        assert process.returncode == int(ExitCode.CONFIG)
