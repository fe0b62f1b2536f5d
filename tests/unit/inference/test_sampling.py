"""The choice of tokens: by probability, reproducible, and without touching torch's generators."""

from __future__ import annotations

import pytest
import torch

from sltrain_dist.inference.sampling import Sampling

LOGITS = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()


def counts(sampling: Sampling, draws: int = 4000) -> list[float]:
    tokens = sampling.choose(LOGITS.expand(draws, -1), range(draws), 0)
    return (tokens.bincount(minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.05, 0.3, 0.15]),
        (Sampling(0.5), [0.6849, 0.0068, 0.2466, 0.0616]),  # squares, divided by their sum
        (Sampling(1.0, top_p=0.79), [0.625, 0.0, 0.375, 0.0]),
        (Sampling(1.0, top_p=0.81), [0.5263, 0.0, 0.3158, 0.1579]),
        (Sampling(1.0, top_p=0.01), [1.0, 0.0, 0.0, 0.0]),
        (Sampling(1e-30), [1.0, 0.0, 0.0, 0.0]),
        (Sampling(0.0), [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_shares(sampling: Sampling, expected: list[float]) -> None:
    found = counts(sampling)
    assert found == pytest.approx(expected, abs=0.025)
    assert [share == 0 for share in found] == [share == 0 for share in expected]


def test_a_token_depends_on_seed_prompt_and_position_alone() -> None:
    state = torch.get_rng_state()
    rows = LOGITS.expand(64, -1)
    first = Sampling(1.0, seed=1).choose(rows, range(64), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(Sampling(1.0, seed=1).choose(rows[:8], range(8, 16), 0), first[8:16])
    assert not torch.equal(Sampling(1.0, seed=1).choose(rows, range(64), 1), first)
    assert not torch.equal(Sampling(1.0, seed=2).choose(rows, range(64), 0), first)
