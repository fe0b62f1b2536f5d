"""Every engine gives the losses, gradient norms and weights of single-process training."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.parallel.environment import Environment

from .cases import BROKEN, CASES, GLOBAL_BATCH, Case, train
from .launch import torchrun

pytest.importorskip("deepspeed")


@cache
def single(case: Case) -> dict[str, Any]:
    return train(case, Environment(0, 1, 0, torch.device("cpu")))


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("parity") / "results.pt"
    run = torchrun(Path(__file__).with_name("cases.py"), str(out), ranks=request.param)
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_equals_single_process(trained: dict[str, Any], case: Case) -> None:
    if case.name not in trained:
        pytest.skip("the micro-batch does not divide the batch on this many ranks")
    got, want = trained[case.name], single(case.reference)
    exact = case.dtype == "fp32"
    assert got["replicas_equal"]
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5 if exact else 2e-2)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-5 if exact else 5e-2)
    for name, weight in want["weights"].items():
        error = float((got["weights"][name] - weight).norm() / weight.norm())
        assert error <= (1e-6 if case.optimizer == "sgd" else 1e-4 if exact else 5e-2), name


def test_a_skipped_reduction_is_seen(trained: dict[str, Any]) -> None:
    """Negative control: without the remainder's all-reduce, losses and replicas drift apart."""
    got, want = trained["skipped reduction"], single(BROKEN.reference)
    assert not got["replicas_equal"]
    assert got["losses"][-1] != pytest.approx(want["losses"][-1], rel=1e-5)
    assert got["norms"][0] != pytest.approx(want["norms"][0], rel=1e-5)


def test_the_cases_can_tell_engines_apart() -> None:
    """Clipping bites, training moves, accumulation is there."""
    plain = single(Case("ddp", 2, "factors", GLOBAL_BATCH, 0.0, "sgd"))
    clipped = single(Case("ddp", 2, "factors", GLOBAL_BATCH, 0.5, "sgd"))
    assert min(clipped["norms"]) > 0.5
    assert plain["losses"][-1] < plain["losses"][0] - 0.05
    assert plain["losses"][1] != pytest.approx(clipped["losses"][1], rel=1e-3)
    assert {case.micro_batch for case in CASES if case.engine == "zero"} == {GLOBAL_BATCH // 2, 2}
