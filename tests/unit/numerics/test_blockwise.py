"""The block quantizer, and stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sltrain_dist.numerics.blockwise import (
    Quantizer,
    pack,
    quantizer,
    signed_levels,
    unpack,
    unsigned_levels,
)
from sltrain_dist.numerics.rounding import random_bits, rounding_key, stochastic_round
from sltrain_dist.numerics.splitmix import splitmix64

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (4, True), (4, False)])


def values(rows: int, width: int, *, signed: bool, seed: int = 0) -> Tensor:
    """Of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, width, generator=generator) * torch.randn(rows, width, generator=generator).exp() ** 3
    return drawn if signed else drawn.abs()


def round_trip(kind: Quantizer, given: Tensor, left: int = 0) -> tuple[Tensor, Tensor]:
    """(decoded values, each value's scale)."""
    scales = kind.largest(given, left)
    decoded = kind.decode(kind.encode(given, scales, left), scales, left)
    return decoded, scales.repeat_interleave(kind.group_size, -1)[:, left : left + given.shape[1]]


class TestLevels:
    def test_are_those_of_bitsandbytes_and_torchao(self) -> None:
        below = [-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105]
        above = [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0]
        assert signed_levels(4) == pytest.approx([*below, 0.0, *above], abs=1e-5)  # NF4
        eights = signed_levels(8)
        assert eights[0] == pytest.approx(-0.99296875)
        assert eights[127:129] == pytest.approx([0.0, 5.5e-7])
        assert unsigned_levels(8)[1:3] == pytest.approx([3.25e-7, 7.75e-7])
        assert unsigned_levels(8)[-2:] == pytest.approx([0.99648, 1.0], abs=1e-5)

    @KINDS
    def test_rise_as_many_as_there_are_codes(self, bits: int, signed: bool) -> None:
        levels = signed_levels(bits) if signed else unsigned_levels(bits)
        assert len(set(levels)) == len(levels) == 1 << bits
        assert levels == sorted(levels)
        assert levels[-1] == 1.0
        assert (0.0 in levels) is signed
        assert signed or levels[0] > 0

    def test_other_bits_are_refused(self) -> None:
        with pytest.raises(ValueError, match="not 5"):
            quantizer(5, 128, CPU, signed=True)


class TestQuantizer:
    @KINDS
    @pytest.mark.parametrize("width", [1, 127, 128, 129, 256, 509, 1024, 4093])
    @pytest.mark.parametrize("left", [0, 1, 100])
    def test_the_nearest_level_is_taken(self, bits: int, signed: bool, width: int, left: int) -> None:
        kind = quantizer(bits, 128, CPU, signed=signed)
        given = values(3, width, signed=signed)
        decoded, scales = round_trip(kind, given, left)
        nearest = (given[..., None] / scales[..., None] - kind.levels).abs().amin(-1)
        torch.testing.assert_close((decoded - given).abs() / scales, nearest, rtol=0, atol=2e-7)

    @KINDS
    def test_error_is_at_most_half_a_gap_of_its_blocks_largest(self, bits: int, signed: bool) -> None:
        kind = quantizer(bits, 256, CPU, signed=signed)
        given = values(40, 777, signed=signed)
        decoded, scales = round_trip(kind, given)
        edge = max(float(kind.levels.diff().max()) / 2, 1 + float(kind.levels[0]) if signed else float(kind.levels[0]))
        assert float(((decoded - given).abs() / scales).max()) <= edge + 2e-7  # of a few roundings
        assert torch.equal(scales.amax(-1), given.abs().amax(-1))

    @KINDS
    def test_borders_are_rounded_as_bucketize_does(self, bits: int, signed: bool) -> None:
        """On every border, and one unit in the last place to its sides."""
        kind = quantizer(bits, 128, CPU, signed=signed)
        inner = kind.borders[:-1]
        given = torch.cat([inner, inner.nextafter(inner + 1), inner.nextafter(inner - 1), kind.levels, -kind.levels])
        given = given[None, : len(given) // 128 * 128].contiguous()
        scales = torch.ones(1, given.shape[1] // 128)
        expected = torch.bucketize(given, inner, out_int32=True)
        assert torch.equal(kind.encode(given, scales).int(), expected)

    @KINDS
    def test_zeros_stay_zeros(self, bits: int, signed: bool) -> None:
        kind = quantizer(bits, 128, CPU, signed=signed)
        given = values(2, 300, signed=signed)
        given[1, 128:256] = 0
        decoded, _ = round_trip(kind, given)
        assert torch.equal(decoded[1, 128:256], torch.zeros(128))
        assert (decoded[1, :128] != 0).any()

    @KINDS
    @pytest.mark.parametrize("bad", [torch.inf, torch.nan])
    def test_what_is_not_finite_is_not_hidden(self, bits: int, signed: bool, bad: float) -> None:
        kind = quantizer(bits, 128, CPU, signed=signed)
        given = values(1, 384, signed=signed)
        given[0, 200] = bad
        decoded, _ = round_trip(kind, given)
        assert not decoded[0, 200].isfinite()
        assert decoded[0, :128].isfinite().all()
        assert decoded[0, 256:].isfinite().all()

    @given(st.integers(1, 9), st.integers(1, 40), st.booleans())
    def test_packing(self, rows: int, width: int, odd: bool) -> None:
        codes = torch.randint(16, (rows, width), dtype=torch.uint8)
        packed = pack(codes, odd=odd)
        assert packed.shape == (rows, -(-(width + odd) // 2))
        assert torch.equal(unpack(packed, width, odd=odd), codes)

    def test_fake_tensors_are_not_kept(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            kind = quantizer(8, 64, CPU, signed=True)
            assert kind.encode(torch.ones(2, 64), torch.ones(2, 1)).shape == (2, 64)
        assert type(quantizer(8, 64, CPU, signed=True).levels) is Tensor


class TestStochasticRounding:
    def test_takes_neighbours_and_is_right_in_the_mean(self) -> None:
        given = torch.tensor([1.0, 1.001, -3.3, 1e-20, 2.0**-133]).repeat(40_000)
        rounded = stochastic_round(given, rounding_key(3, "w"), 0).float()
        spacing = 2.0**-8 * given.abs()
        assert bool(((rounded - given).abs() <= 2 * spacing + 1e-40).all())
        assert torch.equal(rounded[::5], given[::5])  # what bfloat16 holds stays
        means = rounded.view(-1, 5).double().mean(0)
        torch.testing.assert_close(means, given[:5].double(), rtol=1e-4, atol=1e-45)
        assert float(given[1].bfloat16()) == 1.0  # negative control: the nearest one loses 0.001
        assert len(rounded[1::5].unique()) == 2

    @given(st.integers(0, 1 << 33), st.integers(1, 500), st.integers(1, 499))
    @settings(max_examples=30)
    def test_bits_depend_on_the_position_alone(self, start: int, count: int, cut: int) -> None:
        cut = min(cut, count)
        key = rounding_key(7, "a.b")
        together = random_bits(key, start, count, CPU)
        apart = (random_bits(key, start, cut, CPU), random_bits(key, start + cut, count - cut, CPU))
        assert torch.equal(together, torch.cat(apart))
        assert not torch.equal(together, random_bits(rounding_key(8, "a.b"), start, count, CPU))

    def test_bits_are_murmurs_of_a_weyl_sequence(self) -> None:
        """In Python integers."""

        def finalise(h: int) -> int:
            h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
            h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
            return h ^ (h >> 16)

        for key in splitmix64(1, 0, 5).tolist():
            expected = [finalise((key % 2**32 + i * 0x9E3779B1) % 2**32) for i in range(90, 110)]
            assert random_bits(key % 2**32, 90, 20, CPU).tolist() == expected

    def test_low_bits_are_even(self) -> None:
        low = random_bits(rounding_key(1, "w"), 0, 1 << 18, CPU) & 0xFFFF
        counts = torch.bincount(low >> 8, minlength=256).double()
        chi_square = float(((counts - 1024) ** 2 / 1024).sum())
        assert 150 < chi_square < 380  # 255 degrees of freedom: five deviations to both sides

    def test_what_is_not_finite_stays(self) -> None:
        given = torch.tensor([torch.inf, -torch.inf, torch.nan])
        rounded = stochastic_round(given, 5, 0).float()
        assert torch.equal(rounded[:2], given[:2])
        assert bool(rounded[2].isnan())
