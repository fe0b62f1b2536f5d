"""What counts as a spike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import TrainConfig
from sltrain_dist.errors import ConfigError, DivergedError
from sltrain_dist.train.divergence import count_spike, find_spike, remember
from sltrain_dist.train.state import SpikeHistory

TRAIN = TrainConfig(steps=100, spike="skip", spike_window=16, spike_threshold=4.0, spike_limit=2)
USUAL = [2.0 + 0.1 * (i % 5 - 2) for i in range(16)]  # median 2.0, median absolute deviation 0.1


def history(**values: Any) -> SpikeHistory:
    return SpikeHistory(**{"losses": USUAL, "norms": 16 * [1.0], "furthest": 16, **values})


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (2.0 + 3.99 * 0.14826, 1.0, None),
        (2.0 + 4.01 * 0.14826, 1.0, "its loss is 2.595, where the last 16 had 2 ± 0.15"),
        (0.1, 0.1, None),  # only upwards
        (2.0, 1.039, None),  # the spread is at least 1 % of the median
        (2.0, 1.041, "its gradient norm is 1.041, where the last 16 had 1 ± 0.01"),
        (math.nan, 1.0, "its loss is nan"),
        (2.0, math.inf, "its gradient norm is inf"),
    ],
)
def test_what_is_a_spike(loss: float, norm: float, said: str | None) -> None:
    assert find_spike(history(), loss, norm, TRAIN) == said
    off = TRAIN.model_copy(update={"spike": "off"})
    assert find_spike(history(), loss, norm, off) is None


def test_before_there_are_enough_updates_only_what_is_not_finite() -> None:
    few = SpikeHistory()
    for step in range(1, 16):
        assert find_spike(few, 1e6, 1e6, TRAIN) is None
        remember(few, 2.0, 1.0, step, TRAIN)
    assert find_spike(few, math.inf, 1.0, TRAIN) is not None
    remember(few, 2.0, 1.0, 16, TRAIN)
    assert find_spike(few, 1e6, 1.0, TRAIN) is not None
    remember(few, 3.0, 1.0, 17, TRAIN)
    assert few.losses == 15 * [2.0] + [3.0] and few.furthest == 17


def test_only_progress_ends_a_row_of_spikes() -> None:
    spikes = history()
    count_spike(spikes, "bad", 17, TRAIN)
    remember(spikes, 2.0, 1.0, 12, TRAIN)  # the run has gone back
    count_spike(spikes, "bad", 17, TRAIN)
    assert (spikes.total, spikes.in_row) == (2, 2)
    with pytest.raises(DivergedError, match="update 18 is a spike: bad; it is number 3 in a row"):
        count_spike(spikes, "bad", 18, TRAIN)
    remember(spikes, 2.0, 1.0, 17, TRAIN)
    assert (spikes.total, spikes.in_row) == (3, 0)


@pytest.mark.parametrize("word", ["off", "false"])
def test_yaml_reads_off_as_false(word: str) -> None:
    assert build_config({"train": {"steps": 3, "spike": yaml.safe_load(word)}}).train.spike == "off"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"spike": "skip"}, "optim": {"update": "per_layer"}}, "train.spike = .*cannot be skip"),
        ({"train": {"spike": "rewind"}, "checkpoint": {"every": 0}}, "set checkpoint.every"),
        ({"train": {"spike": "skip", "spike_window": 4}}, "train.spike_window"),
        ({"train": {"spike": True}}, "train.spike"),
    ],
)
def test_what_is_refused(values: dict[str, Any], said: str) -> None:
    values["train"]["steps"] = 10
    with pytest.raises(ConfigError, match=said):
        build_config(values)
