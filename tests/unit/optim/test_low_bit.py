"""Adam with states of 32, 8 and 4 bits: the step, the forms of its states, and that ranks do not matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.checkpoint.store import CheckpointStore
from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.errors import CheckpointError, ConfigError
from sltrain_dist.models.build import build_model
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim import low_bit, low_bit_states
from sltrain_dist.optim.factory import make_optimizer, parameter_groups
from sltrain_dist.optim.low_bit import LowBitAdam
from sltrain_dist.optim.state_layout import (
    code_bytes,
    is_quantized,
    shared_groups,
    state_bytes,
    stored_states,
    update_chunks,
)
from sltrain_dist.parallel.pieces import LocalPieces, Piece
from sltrain_dist.parallel.placement import fsdp_range
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.build import build_engine
from sltrain_dist.train.state import check_resumable
from tests.support.held_bytes import rank_bytes
from tests.support.ranks import SINGLE, on_ranks

SHAPES: dict[str, tuple[int, ...]] = {
    "norm": (97,),  # under 4096 values
    "V": (10_007,),  # a prime: cut in the middle of groups, and of bytes
    "U": (4096,),
    "B": (67, 129),  # rows that end in short groups
    "A": (16, 256),
    "small": (63, 65),  # 4095
}
Agreement = Callable[[Environment], low_bit.AllReduceMax]


def first_values(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of very different sizes from value to value."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()).to(dtype)
        for name, shape in SHAPES.items()
    }


def agreement(env: Environment) -> low_bit.AllReduceMax:
    def agree(largest: Tensor) -> None:
        largest.copy_(torch.stack(env.gather(largest)).amax(0))

    return agree


def held_by(env: Environment, optim: OptimConfig, dtype: torch.dtype, agrees: Agreement = agreement) -> LocalPieces:
    """What a rank holds of all parameters under the rule of FSDP2."""
    pieces = []
    for name, value in first_values(dtype).items():
        part = fsdp_range(name, tuple(value.shape), env.rank, env.world_size)
        rows = value.flatten()[part.start : part.stop].view(-1, *value.shape[1:])
        pieces.append(Piece(part, nn.Parameter(rows.clone()), True))
    return LocalPieces(pieces, optim, agrees(env))


def make_updates(held: LocalPieces, steps: range, dtype: torch.dtype) -> None:
    for step in steps:
        wanted = gradients(step, dtype)
        for piece in held.pieces:
            flat = wanted[piece.name].reshape(-1)[piece.range.start : piece.range.stop]
            piece.parameter.grad = flat.view_as(piece.parameter).clone()
        held.update(0.01)


def put_together(saved: list[list[tuple[str, tuple[int, ...], int, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors of all ranks; every value is there once."""
    whole_tensors: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for name, shape, start, data in itertools.chain.from_iterable(saved):
        flat = whole_tensors.setdefault(name, torch.zeros(math.prod(shape), dtype=data.dtype))
        counts = covered.setdefault(name, torch.zeros(math.prod(shape), dtype=torch.int64))
        flat[start : start + len(data)] = data
        counts[start : start + len(data)] += 1
    for name, counts in covered.items():
        assert bool((counts == 1).all()), name
    return whole_tensors


def trained(
    ranks: int, optim: OptimConfig, dtype: torch.dtype = torch.float32, agrees: Agreement = agreement
) -> dict[str, Tensor]:
    """Everything that a checkpoint would hold after four updates."""

    def on_rank(env: Environment) -> list[tuple[str, tuple[int, ...], int, Tensor]]:
        held = held_by(env, optim, dtype, agrees)
        make_updates(held, range(4), dtype)
        return [(part.name, part.shape, part.start, values.clone()) for part, values in held.saved_ranges()]

    return put_together(on_ranks(ranks, on_rank))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


class TestStep:
    @pytest.mark.parametrize("name", ["adamw", "adam"])
    @pytest.mark.parametrize("decay", [0.0, 0.1])
    def test_of_float32_states_is_torchs(self, name: str, decay: float) -> None:
        optim = OptimConfig(name=name, state_bits=32, weight_decay=decay, lr=0.01)  # type: ignore[arg-type]
        theirs = {n: nn.Parameter(v) for n, v in first_values().items()}
        ours = {n: nn.Parameter(v.clone()) for n, v in theirs.items()}
        reference = make_optimizer(theirs.items(), optim)
        assert isinstance(reference, torch.optim.AdamW if name == "adamw" else torch.optim.Adam)
        ranges = {p: TensorRange.whole(n, SHAPES[n]) for n, p in ours.items()}
        optimizer = LowBitAdam(parameter_groups(ours.items(), optim), optim, ranges)
        for step in range(10):
            for n, gradient in gradients(step).items():
                theirs[n].grad, ours[n].grad = gradient, gradient.clone()
            reference.step()
            optimizer.step()
        for n in SHAPES:
            torch.testing.assert_close(ours[n], theirs[n], rtol=1e-5, atol=1e-6)
            for key in ("exp_avg", "exp_avg_sq"):
                want = reference.state[theirs[n]][key].reshape(-1)
                torch.testing.assert_close(optimizer.state[ours[n]][key], want, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.35)])
    def test_of_quantized_states_is_near(self, bits: int, error: float) -> None:
        wide = trained(1, OptimConfig(state_bits=32))
        narrow = trained(1, OptimConfig(state_bits=bits))  # type: ignore[arg-type]
        for name, value in first_values().items():
            moved = wide[f"model.{name}"] - value.reshape(-1)
            off = float((narrow[f"model.{name}"] - wide[f"model.{name}"]).norm() / moved.norm())
            assert off < (error if is_quantized(SHAPES[name], bits) else 1e-6)
            assert off > 1e-4 or not is_quantized(SHAPES[name], bits)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_chunks_do_not_matter(self, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        optim = OptimConfig(state_bits=bits, weight_decay=0.1)  # type: ignore[arg-type]
        want = trained(1, optim)
        monkeypatch.setattr(low_bit_states, "_CHUNK_CPU", 700)
        assert_same(trained(1, optim), want)

    def test_masters_follow_the_float32_run(self) -> None:
        """Updates far below half a unit in the last place of bf16 add up; without masters they are lost."""
        masters = OptimConfig(master_weights=True, state_bits=32)
        start = nn.Parameter(torch.full((5000,), 256.0, dtype=torch.bfloat16))
        lossy = nn.Parameter(start.detach().clone())
        plain = nn.Parameter(start.detach().float())
        kept, lost = make_optimizer([("w", start)], masters), make_optimizer([("w", lossy)], OptimConfig(state_bits=32))
        exact = make_optimizer([("w", plain)], OptimConfig())
        for step in range(300):
            gradient = torch.full((5000,), 1.0 + step % 3)
            start.grad, lossy.grad, plain.grad = gradient.bfloat16(), gradient.bfloat16(), gradient
            for optimizer in (kept, lost, exact):
                optimizer.param_groups[0]["lr"] = 0.01
                optimizer.step()
        torch.testing.assert_close(kept.state[start]["master"], plain.detach(), rtol=1e-6, atol=1e-3)
        assert torch.equal(start.detach(), kept.state[start]["master"].bfloat16())
        assert float(plain.detach()[0]) < 253.5
        assert bool((lossy == 256).all())

    def test_stochastic_rounding_loses_nothing_in_the_mean(self) -> None:
        parameter = nn.Parameter(torch.full((20_000,), 256.0, dtype=torch.bfloat16))
        optimizer = make_optimizer([("w", parameter)], OptimConfig(stochastic_rounding=True, lr=0.01))
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16
        assert float(parameter.detach().float().mean()) == pytest.approx(255.0, abs=0.05)


class TestRanks:
    """States are the same to the bit on any number of ranks."""

    @pytest.mark.parametrize("ranks", [2, 3, 4, 7])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_do_not_matter(self, ranks: int, bits: int) -> None:
        optim = OptimConfig(name="adam", state_bits=bits, weight_decay=0.1)  # type: ignore[arg-type]
        assert_same(trained(ranks, optim), trained(1, optim))

    @pytest.mark.parametrize("optim", [{"stochastic_rounding": True}, {"master_weights": True}])
    @pytest.mark.parametrize("bits", [32, 16, 4])
    def test_do_not_matter_in_bf16(self, optim: dict[str, Any], bits: int) -> None:
        settings = OptimConfig(state_bits=bits, **optim)  # type: ignore[arg-type]
        assert_same(trained(3, settings, torch.bfloat16), trained(1, settings, torch.bfloat16))

    @pytest.mark.parametrize("bits", [8, 4])
    def test_without_agreement_they_would(self, bits: int) -> None:
        """Negative control."""
        optim = OptimConfig(state_bits=bits)  # type: ignore[arg-type]
        got, want = trained(3, optim, agrees=lambda _: lambda largest: None), trained(1, optim)
        assert not torch.equal(got["optim.V.exp_avg_sq.scales"], want["optim.V.exp_avg_sq.scales"])
        assert_same({"B": got["optim.B.exp_avg.codes"]}, {"B": want["optim.B.exp_avg.codes"]})

    def test_cut_blocks_need_agreement(self) -> None:
        part = TensorRange("V", (10_007,), 0, 5004, (5004,))
        parameter = nn.Parameter(torch.zeros(5004))
        with pytest.raises(ValueError, match="pass all_reduce_max"):
            make_optimizer([("V", parameter)], OptimConfig(state_bits=8), ranges={"V": part})

    @pytest.mark.slow
    def test_a_rank_without_a_part_takes_part(self) -> None:
        """4097 values on 83 ranks are 50 each, so that the last one has none."""
        shape, ranks = (4097,), 83
        assert fsdp_range("V", shape, 82, ranks).count == 0

        def on_rank(env: Environment) -> list[tuple[str, tuple[int, ...], int, Tensor]]:
            part = fsdp_range("V", shape, env.rank, ranks)
            parameter = nn.Parameter(torch.ones(part.count))
            held = LocalPieces([Piece(part, parameter, True)], OptimConfig(state_bits=4), agreement(env))
            if part.count:
                parameter.grad = torch.arange(part.start, part.stop).float()
            held.update(0.1)
            return [(part.name, part.shape, part.start, values.clone()) for part, values in held.saved_ranges()]

        states = put_together(on_ranks(ranks, on_rank))
        assert states["optim.V.exp_avg.scales"].tolist() == pytest.approx(
            [0.1 * min(4096, 128 * block + 127) for block in range(33)]
        )


class TestCheckpoint:
    @pytest.mark.parametrize(
        ("optim", "dtype"),
        [
            ({"state_bits": 8}, torch.float32),
            ({"state_bits": 4}, torch.float32),
            ({"state_bits": 4, "stochastic_rounding": True}, torch.bfloat16),
            ({"state_bits": 8, "master_weights": True}, torch.bfloat16),
            ({"state_bits": 32}, torch.bfloat16),
        ],
    )
    @pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (4, 1)])
    def test_of_other_ranks_goes_on_to_the_bit(
        self, tmp_path: Path, optim: dict[str, Any], dtype: torch.dtype, before: int, after: int
    ) -> None:
        settings = OptimConfig(**optim)

        def save(env: Environment) -> Path:
            held = held_by(env, settings, dtype)
            make_updates(held, range(2), dtype)
            return CheckpointStore(tmp_path, env, 1).save(2, held.saved_ranges(), {}, "")

        path = on_ranks(before, save)[0]

        def go_on(env: Environment) -> list[tuple[str, tuple[int, ...], int, Tensor]]:
            held = held_by(env, settings, dtype)
            held.load(CheckpointReader(path).read, 2)
            make_updates(held, range(2, 4), dtype)
            return [(part.name, part.shape, part.start, values.clone()) for part, values in held.saved_ranges()]

        assert_same(put_together(on_ranks(after, go_on)), trained(1, settings, dtype))

    @pytest.mark.parametrize("name", ["adafactor", "adam", "sgd"])
    def test_of_whole_parameters(self, tmp_path: Path, name: str) -> None:
        settings = OptimConfig(name=name)  # type: ignore[arg-type]
        held = held_by(SINGLE, settings, torch.float32)
        make_updates(held, range(2), torch.float32)
        path = CheckpointStore(tmp_path, SINGLE, 1).save(2, held.saved_ranges(), {}, "")
        again = held_by(SINGLE, settings, torch.float32)
        again.load(CheckpointReader(path).read, 2)
        for each in (held, again):
            make_updates(each, range(2, 4), torch.float32)
        got, want = (
            [(part.name, part.shape, part.start, values) for part, values in each.saved_ranges()]
            for each in (again, held)
        )
        assert_same(put_together([got]), put_together([want]))
        assert any("row_var" in name for name, *_ in got) is (name == "adafactor")

    def test_of_another_form_is_refused(self) -> None:
        def config(**optim: Any) -> Any:
            return build_config({"train": {"steps": 1}, "optim": optim})

        for before, after in ((8, 4), (32, 8), (4, 16)):
            with pytest.raises(CheckpointError, match=f"optim.state_bits: {before} → {after}.*set these back"):
                check_resumable(config(state_bits=before), config(state_bits=after), "here")
        with pytest.raises(CheckpointError, match=r"optim\.master_weights: False → True"):
            check_resumable(config(), config(master_weights=True), "here")
        assert check_resumable(config(), config(state_bits=32), "here") == ["optim.state_bits: 16 → 32"]

    def test_float_states_are_widened(self) -> None:
        """16 → 32 bits is allowed, and keeps every value."""
        settings = OptimConfig(state_bits=16)
        held = held_by(SINGLE, settings, torch.bfloat16)
        make_updates(held, range(2), torch.bfloat16)
        saved = {part.name: values.clone() for part, values in held.saved_ranges()}
        wider = held_by(SINGLE, OptimConfig(state_bits=32), torch.bfloat16)
        wider.load(lambda name, start, length: saved[name][start : start + length], 2)
        for part, values in wider.saved_ranges():
            assert values.dtype == (torch.float32 if part.name.startswith("optim.") else torch.bfloat16)
            assert torch.equal(values.float(), saved[part.name].float())


class TestLayout:
    @given(st.integers(1, 30_000), st.integers(1, 9), st.sampled_from((128, 256)), st.integers(1, 5000))
    def test_chunks_cover_a_vector_once(self, size: int, ranks: int, block: int, most: int) -> None:
        for rank in range(ranks):
            place = fsdp_range("v", (size,), rank, ranks)
            cut = list(update_chunks(place, block, most))
            assert [i for s in cut for i in (s.start, s.stop)][1:-1] == [s.start for s in cut[1:] for _ in (0, 1)]
            assert sum(s.stop - s.start for s in cut) == place.count
            assert all((place.start + s.start - s.left) % block == 0 for s in cut)
            assert all(s.last_group - s.first_group == -(-(s.left + s.stop - s.start) // block) for s in cut)

    @pytest.mark.parametrize("bits", [32, 16, 8, 4])
    @pytest.mark.parametrize("ranks", [1, 3])
    @pytest.mark.parametrize("masters", [False, True])
    def test_bytes_are_those_held(self, bits: int, ranks: int, masters: bool) -> None:
        optim = OptimConfig(state_bits=bits, master_weights=masters)  # type: ignore[arg-type]

        def on_rank(env: Environment) -> tuple[int, int]:
            held = held_by(env, optim, torch.bfloat16)
            make_updates(held, range(1), torch.bfloat16)
            expected = sum(state_bytes(fsdp_range(n, s, env.rank, ranks), optim, 2) for n, s in SHAPES.items())
            return sum(state.nbytes for state in held.states()), expected

        for real, expected in on_ranks(ranks, on_rank):
            assert real == expected

    def test_by_hand(self) -> None:
        place = TensorRange.whole("w", (64, 300))
        values, blocks = 64 * 300, {8: 64 * 2, 4: 64 * 3}
        assert state_bytes(place, OptimConfig(state_bits=8), 2) == 2 * (values + 4 * blocks[8])
        assert state_bytes(place, OptimConfig(state_bits=4), 2) == 2 * (values // 2 + 4 * blocks[4])
        assert state_bytes(place, OptimConfig(state_bits=16), 2) == 4 * values
        assert state_bytes(place, OptimConfig(state_bits=32, master_weights=True), 2) == 12 * values
        assert state_bytes(place, OptimConfig(state_bits=32, master_weights=True), 4) == 8 * values
        assert state_bytes(place, OptimConfig(name="adafactor"), 2) == 2 * (64 + 300)
        assert state_bytes(TensorRange.whole("n", (4095,)), OptimConfig(state_bits=4), 2) == 8 * 4095
        assert state_bytes(TensorRange.whole("n", (4097,)), OptimConfig(state_bits=4), 2) == 2 * (2049 + 4 * 33)
        assert code_bytes(TensorRange("v", (10_001,), 3, 4), 4) == 3  # half of the first, the second, the third
        assert code_bytes(TensorRange.whole("w", (3, 5)), 4) == 9

    def test_shared_groups(self) -> None:
        assert shared_groups(fsdp_range("v", (10_007,), 1, 3), 8) == [3336 // 256, 6672 // 256]
        assert shared_groups(fsdp_range("v", (10_240,), 1, 5), 8) == []  # 2048 each
        assert shared_groups(fsdp_range("v", (4095,), 1, 2), 8) == []
        assert shared_groups(fsdp_range("w", (101, 101), 1, 2), 8) == []

    def test_a_scale_is_saved_once_and_read_where_it_is_needed(self) -> None:
        optim = OptimConfig(state_bits=8)
        scales = [stored_states(fsdp_range("v", (10_007,), r, 3), optim, 4)[1] for r in range(3)]
        assert [(s.range.start, s.range.count, s.skip) for s in scales] == [(0, 14, 0), (13, 14, 1), (26, 14, 1)]
        assert all(s.range.shape == (40,) for s in scales)


TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4}


def configurations() -> Iterator[dict[str, Any]]:
    for bits in (32, 16, 8, 4):
        yield {"state_bits": bits}
    yield {"state_bits": 8, "master_weights": True}
    yield {"name": "adafactor"}
    yield {"name": "adam"}


@pytest.mark.parametrize("optim", list(configurations()), ids=str)
def test_whole_models_hold_what_the_closed_form_says(optim: dict[str, Any]) -> None:
    config = build_config({"model": TINY, "reparam": {"rank": 16}, "train": {"steps": 1}, "optim": optim})
    engine = build_engine(build_model(config, torch.device("cpu")), config, SINGLE)
    ids = torch.randint(300, (2, 16))
    engine.micro_step(ids, ids, 0.1, last=True)
    engine.update()
    assert sum(state.nbytes for state in engine.tensors()["states"]) == rank_bytes(config, 1, 0).states


REFUSED = [
    ("optim.state_bits=8 parallel.engine=zero", "parallel.engine=fsdp or ddp"),
    ("optim.state_bits=4 parallel.engine=zero", "parallel.engine=fsdp or ddp"),
    ("optim.state_bits=32 parallel.engine=zero", "parallel.engine=fsdp or ddp"),
    ("optim.stochastic_rounding=true parallel.engine=zero", "parallel.engine=fsdp or ddp"),
    ("optim.master_weights=true parallel.engine=zero", "parallel.engine=fsdp or ddp"),
    ("optim.name=adafactor parallel.engine=zero", "set parallel.engine=ddp"),
    ("optim.name=adafactor parallel.engine=fsdp", "set parallel.engine=ddp"),
    ("optim.name=adafactor optim.state_bits=8", "set it to 16"),
    ("optim.name=sgd optim.state_bits=4", "set it to 16"),
    ("optim.name=sgd optim.master_weights=true", "set it to false"),
    ("optim.name=adafactor optim.stochastic_rounding=true", "set it to false"),
    ("optim.master_weights=true optim.stochastic_rounding=true", "set one of the two to false"),
]


@pytest.mark.parametrize(("overrides", "remedy"), REFUSED)
def test_what_cannot_be_run_is_refused(overrides: str, remedy: str) -> None:
    from sltrain_dist.config.load import load_config

    with pytest.raises(ConfigError, match=remedy) as refusal:
        load_config(None, ["train.steps=1", *overrides.split()])
    assert overrides.split("=")[0] in str(refusal.value) or "stochastic_rounding" in str(refusal.value)
    load_config(None, ["train.steps=1", "parallel.engine=zero", "train.dtype=fp32", "optim.state_bits=32"])
