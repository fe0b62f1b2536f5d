"""memory/events.py: of equal chunks of work, one is recorded and counted for all."""

from __future__ import annotations

from typing import Any

import pytest

from sltrain_dist.config.load import build_config, merged
from sltrain_dist.memory.record import record_ends, record_layer, record_step
from sltrain_dist.numerics import device
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.sparse_lowrank.supports import support
from tests.support.configs import PLANNED

LAYERS: dict[str, dict[str, Any]] = {
    "random": {"reparam": {"support": "random"}},
    "stratified": {"reparam": {"support": "stratified"}, "train": {"activation_checkpointing": "full"}},
    "mixed": {"reparam": {"support": "random"}, "train": {"dtype": "mixed"}},
}


def all_of_them(chunks: Any) -> Any:
    return iter(chunks)


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_in_slices_of_tokens(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five slices and a shorter one, of which three are recorded."""
    monkeypatch.setattr(support, "SLICE", 16)
    shape = {"reparam": {"path": "factored"}, "data": {"seq_len": 88}, "train": {"micro_batch": 1, "global_batch": 1}}
    config = build_config(merged(merged(PLANNED, shape), LAYERS[case]))
    few = record_layer(config, None, "cuda")
    monkeypatch.setattr(device, "_first_second_last", all_of_them)
    assert vars(record_layer(config, None, "cuda")) == vars(few)


@pytest.mark.parametrize("weight_bits", [16, 8])
def test_a_loss_in_chunks_of_tokens(weight_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"train": {"loss_chunk_tokens": 5}, "reparam": {"weight_bits": weight_bits}}
    config = build_config(merged(PLANNED, values))
    few = record_ends(config, "cuda")
    monkeypatch.setattr(device, "_first_second_last", all_of_them)
    assert vars(record_ends(config, "cuda")) == vars(few)


def test_an_optimizer_step_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sltrain_dist.optim.low_bit_states._CHUNK", 1 << 12)
    config = build_config(merged(PLANNED, {"optim": {"state_bits": 8}}))
    arguments = (config, "bfloat16", TensorRange.whole("w", (100, 333)), False, False, "cuda")
    few = record_step(*arguments)
    monkeypatch.setattr(device, "_first_second_last", all_of_them)
    assert vars(record_step(*arguments)) == vars(few)


def test_the_number_of_repetitions() -> None:
    assert list(device.in_turn(range(9))) == list(range(9))
    with device.emulate("cuda"):
        assert [(chunk, device.repetitions()) for chunk in device.in_turn(range(9))] == [(0, 1), (1, 7), (8, 1)]
        assert [(chunk, device.repetitions()) for chunk in device.in_turn(range(3))] == [(0, 1), (1, 1), (2, 1)]
        nested = [device.repetitions() for _ in device.in_turn(range(5)) for _ in device.in_turn(range(4))]
        assert nested == [1, 2, 1, 3, 6, 3, 1, 2, 1]
    assert device.repetitions() == 1
