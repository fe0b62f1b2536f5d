"""Learning-rate schedules and optimizer groups."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config, OptimConfig
from sltrain_dist.optim.factory import make_optimizer
from sltrain_dist.optim.schedule import Progress, learning_rate
from sltrain_dist.train.state import TrainState


def rates(steps: int, **optim: object) -> list[float]:
    config = build_config({"optim": optim, "train": {"steps": steps}})
    state, seen = TrainState(), []
    while not state.finished(config.train):
        seen.append(learning_rate(config.optim, state.progress(config.train, config.optim.warmup_steps)))
        state.advance(tokens=7, warmup_steps=config.optim.warmup_steps)
    return seen


def test_cosine_rises_to_its_peak_and_ends_at_its_minimum() -> None:
    lr = rates(101, lr=1.0, warmup_steps=11, schedule="cosine", min_lr_ratio=0.1)
    assert len(lr) == 101
    assert lr[:11] == pytest.approx([(i + 1) / 11 for i in range(11)])
    assert lr[10] == max(lr) == 1.0
    assert lr[55] == pytest.approx(0.55)  # half way between updates 10 and 100
    assert lr[100] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(lr[10:]))


def test_linear_and_constant() -> None:
    lr = rates(21, lr=2.0, warmup_steps=1, schedule="linear", min_lr_ratio=0.0)
    assert lr == pytest.approx([2.0 - 0.1 * i for i in range(21)])
    assert rates(5, lr=2.0, schedule="constant") == [2.0] * 5


@pytest.mark.parametrize(
    ("decay_type", "last_rates"),
    [
        ("linear", [0.82, 0.64, 0.46, 0.28, 0.1]),
        # 0.1 + 0.9·(1 + cos(πi/5))/2, with cos 36° = 0.80901699 and cos 72° = 0.30901699
        ("cosine", [0.91405765, 0.68905765, 0.41094235, 0.18594235, 0.1]),
        # 0.1 + 0.9·(1 − √(i/5)), with √0.2 = 0.44721360, √0.4 = 0.63245553, √0.6 = 0.77459667, √0.8 = 0.89442719
        ("1-sqrt", [0.59750776, 0.43079002, 0.30286300, 0.19501553, 0.1]),
    ],
)
def test_wsd_rises_stays_and_decays(decay_type: str, last_rates: list[float]) -> None:
    """Of 21 updates, 4 rise, those up to number 15 stay (15 = 20 minus a quarter), and 5 decay."""
    lr = rates(21, lr=1.0, warmup_steps=4, schedule="wsd", decay_ratio=0.25, decay_type=decay_type)
    assert lr[:4] == [0.25, 0.5, 0.75, 1.0]
    assert lr[4:16] == [1.0] * 12
    assert lr[16:] == pytest.approx(last_rates, rel=1e-7)


def test_wsd_of_a_token_budget() -> None:
    config = build_config(
        {
            "optim": {"lr": 1.0, "schedule": "wsd", "decay_ratio": 0.5, "decay_type": "linear", "min_lr_ratio": 0.0},
            "train": {"tokens": 80},
        }
    )
    state, seen = TrainState(), []
    while not state.finished(config.train):
        seen.append(learning_rate(config.optim, state.progress(config.train, 0)))
        state.advance(tokens=10, warmup_steps=0)
    assert seen == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_wsd_of_tokens_decays_after_a_long_warm_up() -> None:
    """How many tokens a warm-up takes is not known in advance: here, more than the decay leaves."""
    optim = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=6, decay_ratio=0.8, decay_type="linear", min_lr_ratio=0.0)
    assert learning_rate(optim, Progress(5, 0.5, 0.0)) == 1.0
    assert learning_rate(optim, Progress(6, 0.6, 0.6)) == 1.0
    assert learning_rate(optim, Progress(7, 0.7, 0.6)) == pytest.approx(0.75)


def test_wsd_that_only_decays_is_the_cosine() -> None:
    optim = {"lr": 0.3, "warmup_steps": 1, "min_lr_ratio": 0.05}
    decay = rates(50, **optim, schedule="wsd", decay_ratio=1.0, decay_type="cosine")
    assert decay == rates(50, **optim, schedule="cosine")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tiny_runs_have_a_finite_rate(steps: int) -> None:
    assert all(0 < lr <= 1 for lr in rates(steps, lr=1.0, warmup_steps=1))
    assert all(0 < lr <= 1 for lr in rates(steps, lr=1.0, warmup_steps=0))


def test_a_token_budget_gives_the_schedule_of_the_steps_it_takes() -> None:
    """With equal updates, 700 tokens at 7 an update are 100 updates, warm-up included."""
    config = build_config({"optim": {"lr": 1.0, "warmup_steps": 10}, "train": {"tokens": 700}})
    state, seen = TrainState(), []
    while not state.finished(config.train):
        seen.append(learning_rate(config.optim, state.progress(config.train, 10)))
        state.advance(tokens=7, warmup_steps=10)
    assert len(seen) == 100
    assert seen[9] == 1.0
    x = (99 * 7 - 70) / (700 - 70)  # the last update begins with 99 behind it
    assert seen[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x)))


def config_of(**optim: object) -> Config:
    return build_config({"optim": optim, "train": {"steps": 1}})


def named() -> list[tuple[str, nn.Parameter]]:
    names = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.B", "lm_head.weight")
    return [(name, nn.Parameter(torch.ones(4))) for name in names]


def test_norms_and_embeddings_do_not_decay() -> None:
    parameters = named()
    optimizer = make_optimizer(parameters, OptimConfig(weight_decay=0.1, lr=1.0))
    for _, parameter in parameters:
        parameter.grad = torch.zeros(4)
    optimizer.step()
    decayed = {name for name, parameter in parameters if parameter[0] < 1}
    assert decayed == {"model.layers.0.mlp.up_proj.B", "lm_head.weight"}


def test_adamw_makes_the_textbook_step() -> None:
    config = config_of(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3)
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = make_optimizer([("w", parameter)], config.optim)
    m = v = torch.zeros(2)
    want = torch.tensor([1.0, 2.0])
    for t, g in enumerate((torch.tensor([0.5, -1.0]), torch.tensor([0.1, 3.0])), start=1):
        parameter.grad = g.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        want = want - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        torch.testing.assert_close(parameter.detach(), want)
