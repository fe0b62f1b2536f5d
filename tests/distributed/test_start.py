"""Starting an engine gives every rank its part of what one process starts from, and takes less than an update."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from sltrain_dist.memory.estimate import estimate
from sltrain_dist.models.count import parameter_shapes
from tests.distributed import start
from tests.distributed.cases import Case, config_of, small_quantized
from tests.distributed.launch import launch
from tests.distributed.start import AFTER, BEFORE, CASES

pytest.importorskip("deepspeed")

RANKS = 3
"""What divides few sizes: shards are uneven, and some are padded. test_parity.py looks at 1, 2 and 4 ranks."""

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case did, by its name; one launch for all."""
    out = tmp_path_factory.mktemp("start") / "start.json"
    launch(start, out, ranks=[RANKS])
    return json.loads(out.read_text())


@each_case
def test_values_are_those_of_one_process_or_of_the_checkpoint(started: dict[str, Any], case: Case) -> None:
    """To the bit: initial weights, and on resume weights and states."""
    assert started[case.name]["initial"] == []
    assert started[case.name]["resumed"] == []


@pytest.mark.parametrize("before", BEFORE, ids=lambda case: case.name)
@pytest.mark.parametrize("after", AFTER, ids=lambda case: case.name)
def test_weights_of_another_run_are_those_of_one_process(started: dict[str, Any], before: Case, after: Case) -> None:
    """To the bit, also where layers are converted."""
    assert started[f"{before.name} → {after.name}"] == []


@each_case
def test_starting_takes_less_than_an_update(started: dict[str, Any], case: Case) -> None:
    found = started[case.name]
    for first, resume, update in zip(found["start"], found["resume"], found["update"], strict=True):
        assert max(first, resume) < update


@pytest.mark.parametrize("case", [case for case in CASES if not case.offload], ids=lambda case: case.name)
def test_starting_takes_what_is_planned(started: dict[str, Any], case: Case) -> None:
    """But for values on their way from the host, which is the device here, and for messages that gloo still holds."""
    config = config_of(case, RANKS)
    shapes = parameter_shapes(config.model, config.reparam)
    on_their_way = 4 * max(math.prod(shape) for _, shape in shapes)
    found = started[case.name]
    with small_quantized():
        timeline = estimate(config, ranks=RANKS, device="cpu").timeline
    planned = [point.total for point in timeline if point.phase == "init"]
    assert max(planned) <= max(found["start"]) <= 1.02 * max(planned) + on_their_way
    if case.engine == "zero3":  # whose first moment is a layer that is whole
        assert max(found["partition"]) <= planned[0] + 2048
