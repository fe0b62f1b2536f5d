"""`optim.update: per_layer` on one rank; tests/distributed has the other engines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sltrain_dist.config.load import build_config
from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.models.build import build_model
from sltrain_dist.numerics.splitmix import integers
from sltrain_dist.optim.clipping import coefficient
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.parallel.pieces import LocalPieces
from sltrain_dist.parallel.placement import accumulated_gradient_bytes
from sltrain_dist.train.step import Rows, forward_backward
from tests.support.configs import TRAINED
from tests.support.ranks import SINGLE

BATCH = 8


def config_of(micro_batch: int = BATCH, parallel: dict[str, Any] | None = None, **optim: Any) -> Config:
    return build_config(
        {
            "model": {
                **TRAINED,
                "init_std": 0.2,
            },
            "reparam": {"rank": 6, "density": 0.1, "alpha": 12.0},
            "data": {"seq_len": 16},
            "optim": {"lr": 0.004, **optim},
            "parallel": parallel or {},
            "train": {"steps": 10, "micro_batch": micro_batch, "global_batch": BATCH, "dtype": "fp32"},
        }
    )


def rows_of(update: int) -> Rows:
    return integers(5, update * 1000, BATCH * 17, 61).astype(np.int32).reshape(BATCH, 17)


class Training:
    """A model in training, as the loop trains it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine = DDPEngine(build_model(config), config.optim, SINGLE)
        self.step, self.norm = 0, None
        self.norms: list[float] = []

    def update(self, count: int = 1) -> Training:
        for _ in range(count):
            self.engine.begin_update(self.config.optim.lr, self.norm)
            forward_backward(self.engine, rows_of(self.step), self.config.train.micro_batch, SINGLE)
            self.norm = self.engine.clip_gradients()
            self.norms.append(self.norm)
            self.engine.update()
            self.step += 1
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.engine.module.named_parameters()}

    def saved(self) -> dict[str, torch.Tensor]:
        return {part.name: values.clone() for part, values in self.engine.saved_ranges()}


def change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((after[name] - before[name]).norm()) for name in before}


@pytest.mark.parametrize("micro_batch", [BATCH, BATCH // 4])
def test_equals_the_whole_update(micro_batch: int) -> None:
    whole = Training(config_of(micro_batch)).update(10)
    ours = Training(config_of(micro_batch, update="per_layer")).update(10)
    assert ours.norms == pytest.approx(whole.norms, rel=1e-6)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(ours.weights()[name], weight, rtol=1e-6, atol=1e-6)


def test_gradients_are_freed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(config_of(update="per_layer"))
    parameters = list(training.engine.module.parameters())
    alive: list[int] = []
    step = LocalPieces.step

    def counting(self: LocalPieces, *args: Any) -> None:
        alive.append(sum(p.grad is not None for p in parameters))
        step(self, *args)

    monkeypatch.setattr(LocalPieces, "step", counting)
    training.update()
    assert len(alive) == len(parameters)  # each is stepped once
    assert max(alive) <= 9  # autograd hands over those of one function, such as that of q, k and v, together
    assert not any(p.grad is not None for p in parameters)


def test_two_passes_clip_exactly() -> None:
    whole = Training(config_of(clip=0.05)).update(10)
    ours = Training(config_of(clip=0.05, update="per_layer", clip_mode="two_pass")).update(10)
    assert min(whole.norms) > 0.05
    assert ours.norms == pytest.approx(whole.norms, rel=1e-6)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(ours.weights()[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["previous_norm", "per_parameter"])
def test_first_update_clips_every_parameter_by_its_own_norm(mode: str) -> None:
    plain, ours = (
        Training(config_of(name="sgd", lr=1.0, update="per_layer", **clip))
        for clip in ({}, {"clip": 0.05, "clip_mode": mode})
    )
    start = plain.weights()
    own, got = change(start, plain.update().weights()), change(start, ours.update().weights())
    assert max(own.values()) > 0.05 > min(own.values())
    assert got == pytest.approx(
        {name: norm * coefficient(norm, 0.05) for name, norm in own.items()}, rel=1e-4, abs=1e-6
    )


def test_later_updates_clip_by_the_norm_of_the_one_before() -> None:
    ours = Training(config_of(name="sgd", lr=1.0, clip=0.05, update="per_layer")).update(2)
    saved, before = ours.saved(), ours.weights()
    plain = Training(config_of(name="sgd", lr=1.0, update="per_layer"))
    plain.engine.load(lambda name, start, length: saved[name][start : start + length], 2)
    plain.step = 2
    scale = coefficient(ours.norms[-1], 0.05)
    assert scale < 1
    expected = {name: scale * norm for name, norm in change(before, plain.update().weights()).items()}
    assert change(before, ours.update().weights()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("micro_batch", [BATCH, BATCH // 4])
def test_goes_on_bit_for_bit_from_what_was_saved(micro_batch: int) -> None:
    config = config_of(micro_batch, clip=0.05, update="per_layer")
    straight = Training(config).update(6)
    first = Training(config).update(3)
    saved = first.saved()
    second = Training(config)
    second.engine.load(lambda name, start, length: saved[name][start : start + length], 3)
    second.step, second.norm = 3, first.norm
    second.update(3)
    assert second.norms == straight.norms[3:]
    assert all(torch.equal(second.weights()[name], weight) for name, weight in straight.weights().items())
    forgetful = Training(config)
    forgetful.engine.load(lambda name, start, length: saved[name][start : start + length], 3)
    forgetful.step = 3  # but not the norm
    assert forgetful.update(3).norms != straight.norms[3:]


@pytest.mark.parametrize(("mode", "kept"), [("two_pass", True), ("previous_norm", False)])
def test_a_gradient_that_is_not_finite(mode: str, kept: bool) -> None:
    training = Training(config_of(clip=0.05, update="per_layer", clip_mode=mode)).update()
    before = training.weights()
    poison = training.engine.module.get_parameter("model.layers.0.mlp.down_proj.B")
    poison.register_hook(lambda gradient: gradient * math.inf)
    assert not math.isfinite(training.update().norms[-1])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), training.weights().values(), strict=True)) is kept


def test_what_waits_between_micro_batches_is_counted() -> None:
    config = config_of(BATCH // 4, update="per_layer")
    training = Training(config)
    ids = torch.from_numpy(rows_of(0)).long()
    training.engine.micro_step(ids[:, :-1], ids[:, 1:], 1.0, last=False)
    waiting = sum(g.nbytes for g in training.engine.tensors()["gradients"])
    assert waiting == accumulated_gradient_bytes(config, 1) > 0


class TestRules:
    @pytest.mark.parametrize(
        ("parallel", "remedy"),
        [
            ({"engine": "zero", "zero_stage": 2}, r"set parallel\.engine=fsdp or ddp"),
            ({"engine": "fsdp", "cpu_offload": True}, r"set parallel\.cpu_offload=false"),
        ],
    )
    def test_engines_that_cannot(self, parallel: dict[str, Any], remedy: str) -> None:
        with pytest.raises(ConfigError, match=rf"optim\.update.*{remedy}"):
            config_of(parallel=parallel, update="per_layer")

    @pytest.mark.parametrize(
        ("optim", "remedy"),
        [
            ({"per_layer_accumulation": "refuse"}, r"per_layer_accumulation=refuse.* 4 micro.*train\.micro_batch=8"),
            ({"clip": 1.0, "clip_mode": "two_pass"}, r"clip_mode=two_pass .* 4 on each rank.*train\.micro_batch=8"),
        ],
    )
    def test_accumulation_that_does_not_go_with_it(self, optim: dict[str, Any], remedy: str) -> None:
        assert micro_batches_per_update(config_of(update="per_layer", **optim), 1) == 1
        with pytest.raises(ConfigError, match=remedy):
            micro_batches_per_update(config_of(BATCH // 4, update="per_layer", **optim), 1)
