"""What holds of the kernel for a step of Adam, in Triton's interpreter (tests/unit) as on a GPU (tests/gpu).

Run on the CPU with TRITON_INTERPRET=1, which must be set before Triton is imported; so not collected by itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics import gpu_kernels
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.factory import clear_states
from sltrain_dist.optim.low_bit import LowBitAdam

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A parameter's shape, the range of it that is updated, the optimizer, and the parameter's type."""

    shape: tuple[int, ...]
    optim: dict[str, Any]
    dtype: torch.dtype = torch.float32
    start: int = 0
    stop: int | None = None
    borders: tuple[int, ...] = ()


# Rows of whole groups, rows that end in a part of one, a vector; parts of vectors that begin within a group and within
# a byte; both Adams; weights in bf16, rounded or with masters.
CASES = {
    "whole groups": Case((20, 256), {}),
    "parts of groups": Case((9, 461), {"weight_decay": 0.1}),
    "odd rows of 4 bits": Case((9, 461), {"state_bits": 4}),
    "vector": Case((4500,), {"name": "adam", "weight_decay": 0.1}),
    "vector of 4 bits": Case((4501,), {"state_bits": 4, "weight_decay": 0.1}),
    "part of a vector": Case((9000,), {}, start=301, stop=5000, borders=(301, 5000)),
    "part between others": Case((9000,), {}, start=301, stop=5000, borders=(100, 301, 5000, 8000)),
    "part of a vector, odd": Case((9000,), {"state_bits": 4}, start=301, stop=5000, borders=(301, 5000)),
    "stochastic": Case((20, 256), {"stochastic_rounding": True, "weight_decay": 0.01}, torch.bfloat16),
    "stochastic part": Case(
        (9000,), {"stochastic_rounding": True, "state_bits": 4}, torch.bfloat16, 257, 5000, (257, 5000)
    ),
}
if not INTERPRETED:  # the interpreter truncates what it casts to bf16
    CASES["masters"] = Case((200, 2048), {"master_weights": True}, torch.bfloat16)
    CASES["bf16"] = Case((2048, 5461), {"state_bits": 4}, torch.bfloat16)


def run(case: Case, monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> dict[str, Tensor]:
    """Returns the parameter and all its states after some updates, by the kernel or by torch's operators."""
    monkeypatch.setattr(gpu_kernels, "DEVICES", [DEVICE] if fused else [])
    if INTERPRETED:  # torch's root of float32 on the CPU is off by one unit for some values; on CUDA it is not
        monkeypatch.setattr(Tensor, "sqrt_", lambda x: x.copy_(torch.from_numpy(np.sqrt(x.numpy()))))
    calls = []
    original = LowBitAdam._update_at_once
    monkeypatch.setattr(LowBitAdam, "_update_at_once", lambda *a, **k: calls.append(1) or original(*a, **k))
    generator = torch.Generator().manual_seed(0)
    whole = TensorRange.whole("layer.weight", case.shape)
    stop = whole.count if case.stop is None else case.stop
    part = TensorRange("layer.weight", case.shape, case.start, stop - case.start, case.borders)
    size = case.shape if part.count == whole.count else (part.count,)
    parameter = nn.Parameter(torch.randn(size, generator=generator).to(DEVICE, case.dtype))
    optim = OptimConfig.model_validate({"state_bits": 8, "lr": 0.01, **case.optim})
    group = {"params": [parameter], "weight_decay": optim.weight_decay}
    adam = LowBitAdam([group], optim, {parameter: part}, all_reduce_max=lambda largest: largest.mul_(1.5))
    for step in range(STEPS):
        gradient = torch.randn(size, generator=generator) * 10.0**-step
        gradient.view(-1)[:300] = 0  # a group of zeros
        parameter.grad = gradient.to(DEVICE, case.dtype)
        adam.step()
        if step == 0:
            clear_states(adam, parameter)
    assert len(calls) == (STEPS if fused else 0)
    states = {name: value for name, value in adam.state[parameter].items() if isinstance(value, Tensor)}
    return {"parameter": parameter.detach(), **states}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_bits_of_torchs_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchs, fused = (run(CASES[name], monkeypatch, fused=each) for each in (False, True))
    assert torchs.keys() == fused.keys()
    for key, expected in torchs.items():
        assert torch.equal(fused[key], expected), key
    before = run(CASES[name], monkeypatch, fused=True)
    assert all(torch.equal(before[key], value) for key, value in fused.items())


def test_what_is_not_finite_stays_in_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "DEVICES", [DEVICE])
    parameter = nn.Parameter(torch.ones(20, 512, device=DEVICE))
    optim = OptimConfig(state_bits=8)
    ranges = {parameter: TensorRange.whole("w", (20, 512))}
    adam = LowBitAdam([{"params": [parameter], "weight_decay": 0.0}], optim, ranges)
    parameter.grad = torch.ones_like(parameter)
    parameter.grad[3, 300] = torch.nan
    parameter.grad[5, 10] = torch.inf
    adam.step()
    bad = adam.state[parameter]["exp_avg.scales"].view(20, 2).isfinite().logical_not().nonzero().tolist()
    assert bad == [[3, 1], [5, 0]]
    assert parameter.isfinite().logical_not().sum() == 2


def test_the_operator_is_declared_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, mutation and shapes under FakeTensor, by torch's own check."""
    from sltrain_dist.optim import fused_step

    recorded: list[Any] = []
    monkeypatch.setattr(fused_step, "step_of_adam_", lambda *arguments: recorded.append(arguments))
    monkeypatch.setattr(gpu_kernels, "DEVICES", [DEVICE])
    parameter = nn.Parameter(torch.ones(20, 256, device=DEVICE))
    optim = OptimConfig(state_bits=8)
    adam = LowBitAdam(
        [{"params": [parameter], "weight_decay": 0.0}], optim, {parameter: TensorRange.whole("w", (20, 256))}
    )
    parameter.grad = torch.ones_like(parameter)
    adam.step()
    torch.library.opcheck(torch.ops.sltrain.step_of_adam_.default, recorded[0])
