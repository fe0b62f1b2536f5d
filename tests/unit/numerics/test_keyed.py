"""numerics/keyed.py: initial values of any range of a tensor, the same everywhere."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sltrain_dist.numerics import keyed
from sltrain_dist.numerics.int8_weight import Int8Weight
from sltrain_dist.numerics.keyed import Initial, chunks

COUNT = 100_003
DRAWN = {
    "uniform": Initial.uniform(0.25, 7, "model.layers.0.mlp.up_proj.A"),
    "normal": Initial.normal(0.02, 7, "lm_head.weight"),
}
ALL = {**DRAWN, "constant": Initial.constant(1.0)}

each_drawn = pytest.mark.parametrize("initial", DRAWN.values(), ids=DRAWN)
each = pytest.mark.parametrize("initial", ALL.values(), ids=ALL)


@each
def test_a_range_is_a_part_of_the_whole(initial: Initial) -> None:
    """To the bit, wherever it begins and ends: at odd places, within a block of passes and over its border."""
    whole = initial.read(0, COUNT)
    border = keyed._IN_CACHE
    for start, stop in (
        (0, 1),
        (1, 2),
        (3, 8),
        (5, 5),
        (border - 1, border + 1),
        (border + 1, 3 * border),
        (77, COUNT),
    ):
        assert torch.equal(initial.read(start, stop - start), whole[start:stop])


@each
def test_filling_is_reading(initial: Initial, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any number of chunks, and rounded to the tensor's type."""
    whole = initial.read(0, COUNT)
    for size in (1 << 20, 1000):
        monkeypatch.setattr(keyed, "CHUNK", size)
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.empty(COUNT, 1, dtype=dtype)
            initial.fill_(tensor)
            assert torch.equal(tensor.view(-1), whole.to(dtype))


def test_a_stream_does_not_change() -> None:
    """Written down once; seeds of runs would else mean other weights in another version, or on another machine."""
    uniform, normal = (initial.read(1_000_001, 4) for initial in DRAWN.values())
    assert uniform.view(torch.int32).tolist() == [1022174900, -1107238252, -1118242504, -1120608356]
    assert normal.view(torch.int32).tolist() == [1006124080, -1123466222, -1127206523, -1157458135]


@each_drawn
def test_streams_follow_seed_and_name(initial: Initial) -> None:
    first = initial.read(0, 1000)
    for other in (Initial(initial.kind, initial.scale, initial.key ^ 1), Initial(initial.kind, initial.scale, 0)):
        assert float((other.read(0, 1000) == first).double().mean()) < 0.01
    assert Initial.normal(1.0, 1, "a").key != Initial.normal(1.0, 2, "a").key != Initial.normal(1.0, 2, "b").key


def test_uniform_values_are_uniform() -> None:
    values = Initial.uniform(0.5, 3, "x").read(0, 1 << 20).double()
    assert values.abs().max() <= 0.5
    histogram = torch.histc(values, 64, -0.5, 0.5) / len(values)
    assert float((histogram - 1 / 64).abs().max()) < 5 * math.sqrt(1 / 64 / len(values))


def test_normal_values_are_the_inverse_distribution_of_uniform_ones() -> None:
    """Against the standard library's, which has sixteen digits; ends and borders between formulas included."""
    ends = [-(2**31), -(2**31) + 1, 2**31 - 1, 0, -1]
    border = [sign * int(0.425 * 2**32) + off for sign in (1, -1) for off in (-300, 0, 300)]
    integers = np.array([*ends, *border, *keyed._integers(5, 0, 20_000)], dtype=np.int32)
    inverse = NormalDist().inv_cdf
    want = np.array([inverse((int(integer) + 0.5) / 2**32 + 0.5) for integer in integers])
    np.testing.assert_allclose(keyed._normal(integers), want, rtol=1e-6, atol=1e-8)


def test_normal_values_are_spread_as_asked() -> None:
    values = Initial.normal(0.02, 3, "x").read(0, 1 << 20).double() / 0.02
    bound = 5 / math.sqrt(len(values))
    assert abs(float(values.mean())) < bound
    assert abs(float(values.square().mean()) - 1) < bound * math.sqrt(2)
    assert abs(float(values.pow(4).mean()) - 3) < bound * math.sqrt(96)
    neighbours = float((values[1:] * values[:-1]).mean())
    assert abs(neighbours) < bound


@pytest.mark.parametrize("shape", [(300, 7), (1000,)], ids=str)
def test_int8_weights_are_those_of_the_values(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks, which end with a row or a block."""
    values = torch.empty(shape)
    DRAWN["normal"].fill_(values)
    want = Int8Weight.empty(shape, torch.float32, "cpu")
    want.copy_(values)
    for size in (1 << 18, 100):
        monkeypatch.setattr(keyed, "CHUNK", size)
        weight = Int8Weight.empty(shape, torch.float32, "cpu")
        DRAWN["normal"].fill_(weight)
        assert torch.equal(weight.codes, want.codes)
        assert torch.equal(weight.scales, want.scales)


def test_chunks_cover_everything_in_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "CHUNK", 10)
    assert list(chunks(25)) == [(0, 10), (10, 20), (20, 25)]
    assert list(chunks(25, 4)) == [(0, 8), (8, 16), (16, 24), (24, 25)]
    assert list(chunks(25, 16)) == [(0, 16), (16, 25)]
    assert list(chunks(0)) == []


@each
def test_tensors_without_values_stay_as_they_are(initial: Initial) -> None:
    initial.fill_(torch.empty(3, device="meta"))
    with FakeTensorMode():
        initial.fill_(torch.empty(3))
