"""The published code as modules: what it computes, and that its recordings add up to what a whole model takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.events import EventLog
from sltrain_dist.models.build import build_model, sparse_layers
from sltrain_dist.models.count import is_factor
from sltrain_dist.models.loss import IGNORE
from sltrain_dist.plan.paper.published import as_published, published_model
from sltrain_dist.plan.paper.published_optimizers import Adam8bit, GaLore, make_optimizer
from sltrain_dist.plan.paper.reference import reference_estimate

LENGTH = 8


def small(**sections: Any) -> Config:
    model = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "num_layers": 2, "num_heads": 4}
    reparam = {"rank": 8, "density": 0.1, "alpha": 16.0, **sections.pop("reparam", {})}
    train = {"steps": 1, "micro_batch": 2, "global_batch": 2, **sections.pop("train", {})}
    data = {"seq_len": LENGTH}
    return build_config({"model": model, "reparam": reparam, "train": train, "data": data, **sections})


@pytest.mark.parametrize(("method", "recompute"), [("full", "none"), ("sltrain", "none"), ("sltrain", "full")])
def test_loss_and_gradients_are_those_of_our_model(method: str, recompute: str) -> None:
    """Same weights and positions, in float32: another way to the same numbers."""
    config = small(reparam={"method": method}, train={"dtype": "fp32", "activation_checkpointing": recompute})
    ours, theirs = build_model(config), as_published(build_model(config), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(".B") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        theirs.load_state_dict(dict(ours.named_parameters()), strict=False)
        for name, layer in sparse_layers(ours):
            theirs.get_submodule(name).support.positions.copy_(layer.support.indices())
    ids = torch.randint(config.model.vocab_size, (2, LENGTH), generator=generator)
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), IGNORE)), dim=1)
    loss = theirs(ids, ids)
    mean = ours(ids, labels) / (labels != IGNORE).sum()
    torch.testing.assert_close(loss, mean)
    loss.backward()
    mean.backward()
    expected = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert {name for name, _ in theirs.named_parameters()} == set(expected)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


RUNS = {
    "full, 16 bits": {"reparam": {"method": "full"}},
    "sltrain, 16 bits, accumulating": {"train": {"global_batch": 4}},
    "sltrain, per layer": {"optim": {"state_bits": 8, "update": "per_layer"}},
    "galore, whole": {"reparam": {"method": "galore"}},
    "galore, per layer, recomputed": {
        "reparam": {"method": "galore"},
        "optim": {"state_bits": 8, "update": "per_layer"},
        "train": {"activation_checkpointing": "full"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_played_recordings_are_what_a_whole_model_takes(run: str) -> None:
    """All layers together on fake tensors, stepped by hooks or at the end, against one layer played for each."""
    config = small(**RUNS[run])
    estimate = reference_estimate(config)
    whole, passes = config.optim.update == "whole", config.train.global_batch // 2
    with FakeTensorMode(), EventLog("cuda") as log:
        model = published_model(config)
        batch = [torch.empty(2, LENGTH, dtype=torch.int64) for _ in ("ids", "labels", "padding mask")]
        step = stepping(model, config)
        for _ in range(2):  # the first update makes the states
            for _ in range(passes if whole else 1):
                log.begin("forward")
                loss = model(batch[0], batch[1])
                log.begin("backward")
                loss.backward()
                del loss
            log.begin("update")
            step()
    live = {moment.name: sum(moment.components.values()) for moment in log.moments()}  # of the last of each
    phases = {phase: point.total for phase, point in estimate.phases().items()}
    counters = 4 * len(list(model.parameters())) if config.optim.state_bits == 16 else 0  # Adam's, on the CPU
    mask = 2 * 2 * LENGTH * LENGTH  # which the player keeps to the end of the update
    for phase in ("forward", "backward", "update") if whole else ("forward", "backward"):
        assert live[phase] - counters == pytest.approx(phases[phase], abs=mask + 2), phase


def stepping(model: nn.Module, config: Config) -> Callable[[], None]:
    """Makes optimizers, and with per-layer updates the hooks that step them; returns what ends an update."""
    galore, together = config.reparam.method == "galore", config.optim.update == "whole"
    parameters = dict(model.named_parameters())
    projected = [p for name, p in parameters.items() if galore and is_factor(name)]
    others = [p for name, p in parameters.items() if not (galore and is_factor(name))]
    sets = [([p], True) for p in projected]
    sets += [(others, False)] if together else [([p], False) for p in others]
    optimizers = [(some, make_optimizer(some, replaced, config)) for some, replaced in sets]

    def hook(optimizer: Optimizer, parameter: Any) -> None:
        optimizer.step()
        parameter.grad = None

    def end() -> None:
        for parameter in parameters.values() if together else ():
            assert parameter.grad is not None
            parameter.grad.clone()  # for its norm
        for _, optimizer in optimizers if together else ():
            optimizer.step()
        model.zero_grad()

    if not together:
        for (parameter,), optimizer in optimizers:
            parameter.register_post_accumulate_grad_hook(partial(hook, optimizer))
    return end


def test_galore_moves_a_weight_within_a_space_of_its_rank() -> None:
    torch.manual_seed(0)
    for shape in ((12, 8), (8, 12)):
        parameter = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        parameter.grad = torch.randn(shape, dtype=torch.bfloat16)
        GaLore(parameter, 3, 16).step()
        singular = torch.linalg.svdvals(parameter.detach().float())
        assert singular[2] > 10 * singular[3]


def test_8_bit_states() -> None:
    """A byte a value and a float32 scale for 2048 of them, twice; float32 below 4096 values."""
    large, small = nn.Parameter(torch.zeros(3, 2048)), nn.Parameter(torch.zeros(4095))
    optimizer = Adam8bit([large, small])
    optimizer.step()
    bytes_of = [sum(value.nbytes for value in optimizer.state[p].values()) for p in (large, small)]
    assert bytes_of == [2 * (3 * 2048 + 4 * 3), 2 * 4 * 4095]
