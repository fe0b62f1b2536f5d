"""Every engine gives the losses, gradient norms and weights of single-process training, and holds and sends
what the closed forms say."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch

from sltrain_dist.models.count import parameter_shapes
from sltrain_dist.parallel.communication import update_traffic
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train import step
from tests.distributed import cases
from tests.distributed.cases import (
    BROKEN,
    CASES,
    EAGER,
    PER_LAYER,
    RANKS,
    VALUES,
    WHOLE,
    Case,
    cases_on,
    config_of,
    differing,
    first_weights,
    runs,
    small_quantized,
    train,
)
from tests.distributed.launch import launch
from tests.support.held_bytes import rank_bytes

pytest.importorskip("deepspeed")

FINE, COARSE = (1e-5, 1e-5, 1e-4), (5e-3, 2e-2, 1e-1)
"""Tolerances of losses, norms and weights. Sixteen bits, and quantized states, round away what comes in another
order."""


@cache
def single(case: Case) -> dict[str, Any]:
    return train(case, Environment(0, 1, 0, torch.device("cpu")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Results of all cases by number of ranks."""
    out = tmp_path_factory.mktemp("parity")
    launch(cases, out, ranks=RANKS)
    return {ranks: torch.load(out / f"{ranks}.pt", weights_only=True) for ranks in RANKS}


RUNS = [(ranks, case) for ranks in RANKS for case in cases_on(ranks)]
each_run = pytest.mark.parametrize(("ranks", "case"), RUNS, ids=[f"{ranks} ranks-{case.name}" for ranks, case in RUNS])


@each_run
def test_equals_single_process(trained: dict[int, dict[str, Any]], ranks: int, case: Case) -> None:
    got, want = trained[ranks][case.name], single(case.reference)
    fine = case.dtype == "fp32" and case.bits >= 16 and case.weight_bits == 16
    of_losses, of_norms, of_weights = FINE if fine else COARSE
    orthogonalized = case.factors != "adam" and fine
    if orthogonalized:  # which does not amplify the rounding of small gradients, as Adam does
        of_losses, of_weights = 1e-6, 3e-6
    assert got["replicas_equal"]
    assert got["losses"] == pytest.approx(want["losses"], rel=of_losses)
    assert got["norms"] == pytest.approx(want["norms"], rel=of_norms)
    weights, expected = comparable(got["weights"], case), comparable(want["weights"], case)
    assert weights.keys() == expected.keys()
    exact = case.optimizer == "sgd" and case.dtype == "fp32"
    for name, weight in expected.items():
        error = float((weights[name] - weight).norm() / weight.norm())
        # Adam treats each value by itself, so turned factors get other updates.
        turned = 4 if case.restart and not orthogonalized else 1
        assert error <= (1e-6 if exact else turned * of_weights), name


def comparable(weights: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """Weights that rounding changes little. After a restart, those are the products BA: where singular values lie close
    together, or the largest entries of a vector are about equal, rounding turns the factors or their signs."""
    if case.restart == 0 or case.weight_bits == 8:
        return weights
    others = {name: weight for name, weight in weights.items() if not name.endswith((".B", ".A"))}
    layers = [name.removesuffix(".B") for name in weights if name.endswith(".B")]
    return others | {f"{layer}.BA": weights[f"{layer}.B"] @ weights[f"{layer}.A"] for layer in layers}


def test_other_restarts_are_seen() -> None:
    """Negative control: restarts change the training, and so does which states they clear."""
    plain, every, factors = (
        single(Case(**some)) for some in ({}, {"restart": 2}, {"restart": 2, "cleared": "factors"})
    )
    assert every["losses"][:3] == pytest.approx(plain["losses"], rel=1e-6)
    assert every["losses"][3:] != pytest.approx(factors["losses"][3:], rel=1e-4)
    assert every["losses"][2] != pytest.approx(single(Case(restart=1))["losses"][2], rel=1e-4)


@each_run
def test_starts_from_the_same_weights(trained: dict[int, dict[str, Any]], ranks: int, case: Case) -> None:
    """To the bit."""
    want = first_weights(config_of(case, ranks))
    assert differing(trained[ranks][case.name]["first"], want) == []


@each_run
def test_holds_what_the_closed_form_says(trained: dict[int, dict[str, Any]], ranks: int, case: Case) -> None:
    config = config_of(case, ranks)
    for rank, held in enumerate(trained[ranks][case.name]["held"]):
        with small_quantized():
            expected = rank_bytes(config, ranks, rank)
        assert held == {"parameters": expected.parameters, "gradients": expected.gradients, "states": expected.states}


@each_run
def test_sends_what_the_closed_form_says(trained: dict[int, dict[str, Any]], ranks: int, case: Case) -> None:
    sent = trained[ranks][case.name]["sent"]
    with small_quantized():
        expected = update_traffic(config_of(case, ranks), ranks)
    numbers = 100  # bytes, for counts, the loss and the norm
    if case.clip_mode == "per_parameter":
        config = config_of(case, ranks)
        numbers += 8 * len(parameter_shapes(config.model, config.reparam))  # and each parameter's norm
    if case.engine == "zero3":  # which does not gather what it finds gathered
        assert expected.all_gather / 2 <= sent["all_gather"] <= expected.all_gather
    else:
        assert sent["all_gather"] == expected.all_gather
    assert sent["reduce_scatter"] == expected.reduce_scatter
    assert expected.all_reduce <= sent["all_reduce"] <= expected.all_reduce + numbers
    assert sent["other"] == expected.other


@pytest.mark.parametrize("case", PER_LAYER, ids=lambda case: case.name)
def test_per_layer_updates_equal_whole_ones(trained: dict[int, dict[str, Any]], case: Case) -> None:
    """Of AdamW without clipping, on two ranks."""
    got, want = trained[2][case.name], trained[2][WHOLE[case].name]
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-6)
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_skipped_reduction_is_seen(trained: dict[int, dict[str, Any]], ranks: int) -> None:
    """Negative control: without the remainder's all-reduce, losses and replicas drift apart."""
    got, want = trained[ranks]["skipped reduction"], single(BROKEN.reference)
    assert not got["replicas_equal"]
    assert got["losses"][-1] != pytest.approx(want["losses"][-1], rel=1e-5)
    assert got["norms"][0] != pytest.approx(want["norms"][0], rel=1e-5)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_remainder_counted_again_is_seen(trained: dict[int, dict[str, Any]], ranks: int) -> None:
    """Negative control: a norm in which every rank adds the remainder is another one, and clips otherwise."""
    got, want = trained[ranks]["remainder counted again"], single(BROKEN.reference)
    assert got["norms"][0] > 1.01 * want["norms"][0]
    assert got["losses"][-1] != pytest.approx(want["losses"][-1], rel=1e-5)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_step_at_every_micro_batch_is_seen(trained: dict[int, dict[str, Any]], ranks: int) -> None:
    """Negative control: what per-layer updates do under accumulation in the reference code is other training."""
    right, got, want = (
        trained[ranks][EAGER.name],
        trained[ranks]["stepped at every micro-batch"],
        single(EAGER.reference),
    )
    assert right["losses"][-1] == pytest.approx(want["losses"][-1], rel=1e-5)
    assert got["losses"][-1] != pytest.approx(want["losses"][-1], rel=1e-2)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_bad_value_on_one_rank_is_seen_by_all(trained: dict[int, dict[str, Any]], ranks: int) -> None:
    norms = trained[ranks]["one bad value"]
    assert len(norms) == 4
    for of_ranks in norms.values():
        assert of_ranks == [math.inf] * ranks


def test_the_cases_can_tell_engines_apart() -> None:
    """Clipping bites, and training moves the loss by hundreds of times what engines may differ by."""
    plain, clipped = single(Case(optimizer="sgd")), single(Case(optimizer="sgd", clip=0.05))
    assert min(clipped["norms"]) > 0.05
    assert plain["losses"][-1] < plain["losses"][0] - 0.03
    assert plain["losses"][1] != pytest.approx(clipped["losses"][1], rel=1e-3)


def test_documents_that_see_each_other_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an engine that lost the positions would train otherwise."""
    want = single(Case(packed=True))
    monkeypatch.setattr(step, "_positions", lambda begins: torch.arange(begins.shape[1]).expand(begins.shape))
    got = train(Case(packed=True), Environment(0, 1, 0, torch.device("cpu")))
    assert got["losses"][1] != pytest.approx(want["losses"][1], rel=1e-3)


def test_every_pair_of_settings_is_in_a_case() -> None:
    for (one, ones), (two, twos) in itertools.combinations(VALUES.items(), 2):
        for a, b in itertools.product(ones, twos):
            if runs(Case(**{one: a, two: b}), 1):
                assert any((getattr(c, one), getattr(c, two)) == (a, b) for c in CASES), (one, a, two, b)
