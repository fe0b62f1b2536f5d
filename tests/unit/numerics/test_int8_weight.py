"""int8 weights: their codes, the update that rounds at random, and that a model trains with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config, OptimConfig, SupportKind
from sltrain_dist.errors import ConfigError
from sltrain_dist.models.build import build_meta_model, build_model, supports_fingerprint
from sltrain_dist.models.count import is_int8, parameter_bytes, parameter_shapes
from sltrain_dist.models.llama import Head
from sltrain_dist.models.loss import cross_entropy_sum
from sltrain_dist.numerics.int8_layout import INT8_GROUP, int8_bytes, scale_count
from sltrain_dist.numerics.int8_weight import Int8Weight, parts_of, plain
from sltrain_dist.numerics.rounding import rounding_key
from sltrain_dist.optim.factory import make_optimizer
from sltrain_dist.optim.low_bit import LowBitAdam
from sltrain_dist.sparse_lowrank import SLLinear
from sltrain_dist.sparse_lowrank.cost import Path
from sltrain_dist.train.build import build_engine
from sltrain_dist.train.observers.sanity_checks import check_update
from tests.support.configs import TRAINED
from tests.support.held_bytes import rank_bytes
from tests.support.ranks import SINGLE
from tests.unit.parallel.test_per_layer import Training, config_of
from tests.unit.sparse_lowrank.test_layer import made, make_layer, results

SHAPES: tuple[tuple[int, ...], ...] = ((67, 129), (1, 1), (16, 256), (3, 1), (255,), (256,), (257,), (10_007,))
REPARAM = {"weight_bits": 8, "rank": 6, "density": 0.1, "alpha": 12.0}


def int8(values: Tensor, dtype: torch.dtype = torch.float32) -> Int8Weight:
    weight = Int8Weight.empty(tuple(values.shape), dtype, "cpu")
    weight.copy_(values)
    return weight


def by_scale(values: Tensor) -> tuple[Tensor, ...]:
    """The rows of a matrix, or the blocks of a vector."""
    return values.unbind(0) if values.dim() > 1 else values.split(INT8_GROUP)


class TestCodes:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_values_are_off_by_half_a_step_at_most(self, shape: tuple[int, ...]) -> None:
        values = made(shape, torch.float32, 1)
        weight = int8(values)
        assert weight.codes.shape == shape and weight.scales.shape == (scale_count(shape),)
        assert weight.codes.nbytes + weight.scales.nbytes == int8_bytes(shape)
        got = plain(weight, torch.float32)
        for want, row, scale in zip(by_scale(values), by_scale(got), weight.scales, strict=True):
            assert float((row - want).abs().max()) <= 0.501 * float(scale)
            assert float(scale) == pytest.approx(float(want.abs().max()) / 112)
        assert torch.equal(plain(weight, torch.bfloat16), got.bfloat16())  # rounded once

    def test_rows_of_zeros_stay_so(self) -> None:
        weight = int8(torch.zeros(3, 5))
        assert torch.equal(plain(weight, torch.bfloat16), torch.zeros(3, 5, dtype=torch.bfloat16))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_bad_value_spoils_its_row_alone(self, bad: float) -> None:
        values = made((3, 40), torch.float32, 1)
        values[1, 7] = bad
        got = int8(values)
        assert torch.equal(plain(got, torch.float32).isfinite().all(1), torch.tensor([True, False, True]))

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_what_does_not_change_is_not_rounded_again(self, shape: tuple[int, ...]) -> None:
        weight = int8(made(shape, torch.float32, 1))
        codes, scales = weight.codes.clone(), weight.scales.clone()
        for step in range(20):
            weight.write_stochastic(0, weight.read(0, weight.numel(), torch.float32), step)
        assert torch.equal(weight.scales, scales)
        assert int((weight.codes != codes).sum()) == 0

    def test_a_row_keeps_its_scale_while_it_fits(self) -> None:
        weight = int8(torch.ones(1, 4))
        (first,) = weight.scales.tolist()
        for largest, keeps in ((1.13, True), (0.6, True), (1.14, False), (0.5, False)):
            weight.copy_(torch.ones(1, 4))
            weight.write(0, torch.tensor([largest, 0.1, 0.0, -0.2]))
            (scale,) = weight.scales.tolist()
            assert (scale == first) is keeps, largest
            assert scale == (first if keeps else pytest.approx(largest / 112))

    def test_arithmetic_on_it_is_refused(self) -> None:
        weight = int8(torch.ones(2, 3))
        for wrong in (lambda: weight + 1, lambda: torch.ones(3) @ weight.t(), lambda: torch.ones(2, 3).copy_(weight)):
            with pytest.raises((NotImplementedError, TypeError), match=r"use plain\(\)"):
                wrong()


class TestRounding:
    def test_is_right_in_the_mean(self) -> None:
        values = made((4, 500), torch.float32, 3)
        weight = int8(values)
        total = torch.zeros_like(values)
        trials = 400
        for step in range(trials):
            weight.write_stochastic(0, values.flatten().clone(), rounding_key(step, "B"))
            total += plain(weight, torch.float32)
        unit = weight.scales[:, None]
        error = (total / trials - values) / unit  # of at most half a step's spread, divided by the root of the trials
        assert float(error.abs().max()) < 4.5 * 0.5 / trials**0.5
        assert float(error.mean().abs()) < 4 * 0.5 / (trials * values.numel()) ** 0.5
        nearest = (plain(int8(values), torch.float32) - values) / unit
        assert float(nearest.abs().max()) > 0.4  # what would be seen without it

    def test_depends_on_key_and_position_alone(self) -> None:
        values = made((9, 64), torch.float32, 3).flatten()
        whole, parts, other = (int8(torch.zeros(9, 64)) for _ in range(3))
        whole.write_stochastic(0, values.clone(), 7)
        for start, stop in ((0, 128), (128, 320), (320, 576)):
            parts.write_stochastic(start, values[start:stop].clone(), 7)
        other.write_stochastic(0, values.clone(), 8)
        assert torch.equal(whole.codes, parts.codes)
        assert not torch.equal(whole.codes, other.codes)


class TestUpdate:
    @pytest.mark.parametrize("bits", [32, 16, 8, 4])
    def test_moves_weights_right_in_the_mean_where_a_step_is_small(self, bits: int) -> None:
        """By a hundredth of the distance between two codes, which rounding to the nearest would lose."""
        values = made((300, 200), torch.float32, 5).clamp_(-3, 3)
        values[:, 0] = 3.0  # one scale for all
        weight = nn.Parameter(int8(values))
        before, step = plain(weight.detach(), torch.float32), float(weight.scales[0])
        optim = OptimConfig(state_bits=bits, lr=0.01 * step)  # type: ignore[arg-type]
        optimizer = make_optimizer([("B", weight)], optim)
        assert isinstance(optimizer, LowBitAdam)
        sign = torch.where(made((300, 200), torch.float32, 6) > 0, 1.0, -1.0)
        for _ in range(10):
            weight.grad = sign.clone()
            optimizer.step()
        moved = (before - plain(weight.detach(), torch.float32)) * sign / step
        assert float(moved.mean()) == pytest.approx(0.1, abs=4 * 0.3 / 60_000**0.5)
        assert float(moved.min()) > -0.01  # none went the other way

    def test_equals_adam_but_for_rounding(self) -> None:
        values = made((40, 30), torch.float32, 5)
        weight, exact = nn.Parameter(int8(values)), nn.Parameter(values.clone())
        optim = OptimConfig(state_bits=32, lr=0.05, weight_decay=0.1)
        optimizers = [make_optimizer([("B", weight)], optim), torch.optim.AdamW([exact], lr=0.05, weight_decay=0.1)]
        for step in range(20):
            weight.grad = exact.grad = made((40, 30), torch.float32, 50 + step)
            for optimizer in optimizers:
                optimizer.step()
        error = (plain(weight.detach(), torch.float32) - exact.detach()) / weight.scales[:, None]
        assert float(error.abs().max()) < 10  # 21 roundings, each by less than a step
        assert float(error.square().mean().sqrt()) < 0.5 * 21**0.5

    def test_vectors_of_any_length_in_spans(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A span begins with a scale of its own, whatever blocks the states have."""
        weights = []
        for span in (1 << 16, 512):
            monkeypatch.setattr("sltrain_dist.optim.low_bit_states._CHUNK_CPU", span)
            weight = nn.Parameter(int8(made((10_007,), torch.float32, 1)))
            optimizer = make_optimizer([("V", weight)], OptimConfig(state_bits=4, lr=0.1))
            weight.grad = made((10_007,), torch.float32, 2)
            optimizer.step()
            weights.append(weight)
        assert torch.equal(weights[0].codes, weights[1].codes)


def quantized(layer: SLLinear) -> tuple[SLLinear, SLLinear]:
    """The layer with int8 weights, and another with what these stand for."""
    other = SLLinear(
        layer.in_features, layer.out_features, layer.rank, layer.density, layer.alpha, support=layer.support.kind,
        path=layer.path, row_block_bytes=layer.row_block_bytes, name=layer.name, seed=layer.seed, dtype=layer.B.dtype,
    )  # fmt: skip
    for name, parameter in list(layer.named_parameters()):
        weight = int8(parameter, parameter.dtype)
        layer.register_parameter(name, nn.Parameter(weight))
        other.get_parameter(name).data = plain(weight, parameter.dtype)
    return layer, other


class TestOperator:
    @pytest.mark.parametrize(
        ("support", "path", "block"),
        [
            ("random", "materialize", None),
            ("random", "factored", None),
            ("stratified", "materialize", 1000),
            ("blocks", "factored", None),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_equals_the_one_on_dequantized_weights(
        self, support: SupportKind, path: Path, block: int | None, dtype: torch.dtype
    ) -> None:
        base = SLLinear(
            59, 101, 7, 0.1, 14.0, support=support, path=path, row_block_bytes=block, name="a.q", seed=0, dtype=dtype
        )
        base.B.data = made((101, 7), dtype, 1)
        layer, reference = quantized(base)
        x, g = made((2, 9, 59), dtype, 4), made((2, 9, 101), dtype, 5)
        got, want = results(layer, x, g), results(reference, x, g)
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert type(got[key]) is Tensor and got[key].dtype == dtype
            assert torch.equal(got[key], tensor), key
        assert torch.equal(layer.dense_weight(), reference.dense_weight())

    @pytest.mark.parametrize("path", ["materialize", "factored"])
    def test_saves_codes_and_nothing_of_the_weights_size(self, path: Path) -> None:
        layer, _ = quantized(make_layer(67, 53, 13, torch.float32))
        layer.path = path
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(made((5, 53), torch.float32, 4))
        weights = [t for t in saved if isinstance(t, Int8Weight)]
        assert {t.codes.data_ptr() for t in weights} == {p.codes.data_ptr() for p in layer.parameters()}
        assert all(t.numel() <= 5 * 53 for t in saved if not isinstance(t, Int8Weight))


class TestHead:
    @pytest.mark.parametrize("chunk", [0, 7, 100])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_equals_the_one_on_dequantized_weights(
        self, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sltrain_dist.numerics.int8_weight._CHUNK", 24 * 10)  # ten words at a time, and three
        head = Head(24, 53, name="lm_head", seed=0, std=0.3, chunk_tokens=chunk).to(dtype)
        weight = int8(head.weight, dtype)
        head.weight = nn.Parameter(weight)
        x, labels = made((3, 5, 24), dtype, 4), torch.arange(15).view(3, 5)
        labels[1, 2] = -100
        outputs = []
        for run in (head, None):
            inputs, leaf = x.clone().requires_grad_(), plain(weight, dtype).requires_grad_()
            loss = run(inputs, labels) if run else cross_entropy_sum(F.linear(inputs, leaf), labels)
            (loss * 0.1).backward()
            outputs.append((loss.detach(), inputs.grad, head.weight.grad if run else leaf.grad))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for got, want in zip(*outputs, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(head(x, labels), outputs[1][0], rtol=tolerance, atol=tolerance)
            assert torch.equal(head(x), F.linear(x, plain(weight, dtype)))


def model_config(reparam: dict[str, Any] | None = None, **sections: Any) -> Config:
    return build_config(
        {
            "model": {
                **TRAINED,
                **sections.pop("model", {}),
            },
            "reparam": REPARAM | (reparam or {}),
            "data": {"seq_len": 16},
            "train": {"steps": 1, "micro_batch": 4, "global_batch": 4, "dtype": "fp32", **sections.pop("train", {})},
            **sections,
        }
    )


class TestModel:
    @pytest.mark.parametrize("support", ["random", "blocks"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_has_the_int8_weights_that_the_rule_says(self, support: str, tied: bool) -> None:
        config = model_config({"support": support}, model={"tie_head": tied})
        model, usual = build_model(config), build_model(model_config({"support": support, "weight_bits": 16}))
        start = dict(usual.named_parameters())
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, Int8Weight) == is_int8(name, config.reparam), name
            if isinstance(parameter, Int8Weight):
                assert parameter.requires_grad and parameter.is_leaf
                error = (plain(parameter.detach(), torch.float32) - start[name].detach()).abs()
                assert float(error.max()) <= 0.501 * float(parameter.scales.max())
        assert isinstance(model.lm_head.weight, Int8Weight) is not tied
        assert not isinstance(model.model.embed_tokens.weight, Int8Weight)

    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_takes_the_bytes_that_the_rule_says(self, dtype: str) -> None:
        config = model_config(train={"dtype": dtype})
        engine = build_engine(build_model(config), config, SINGLE)
        width = 2 if dtype == "bf16" else 4
        shapes = parameter_shapes(config.model, config.reparam)
        expected = sum(parameter_bytes(name, shape, config.reparam, width) for name, shape in shapes)
        assert sum(t.untyped_storage().nbytes() for t in engine.tensors()["parameters"]) == expected
        assert rank_bytes(config, 1, 0).parameters == expected
        assert {str(t.device) for t in parts_of(build_meta_model(config).lm_head.weight).values()} == {"meta"}


def int8_training(micro_batch: int = 8, **optim: Any) -> Training:
    config = config_of(micro_batch, **optim)
    return Training(config.model_copy(update={"reparam": config.reparam.model_copy(update={"weight_bits": 8})}))


@pytest.mark.slow
class TestTraining:
    @pytest.mark.parametrize("micro_batch", [8, 2])
    def test_per_layer_equals_whole(self, micro_batch: int) -> None:
        """To the bit: gradients are the same, and so is what is rounded up."""
        optim = {"state_bits": 8}
        whole = int8_training(micro_batch, **optim).update(6)
        ours = int8_training(micro_batch, update="per_layer", **optim).update(6)
        assert ours.norms == pytest.approx(whole.norms, rel=1e-6)
        for name, saved in whole.saved().items():
            assert torch.equal(ours.saved()[name], saved), name

    @pytest.mark.parametrize("recompute", ["none", "full"])
    def test_goes_on_bit_for_bit_from_what_was_saved(self, recompute: str) -> None:
        optim = {"clip": 0.05, "update": "per_layer", "state_bits": 4}
        straight, first, second = (int8_training(**optim) for _ in range(3))
        if recompute == "full":
            config = straight.config.model_copy(
                update={"train": straight.config.train.model_copy(update={"activation_checkpointing": "full"})}
            )
            second.engine = build_engine(build_model(config), config, SINGLE)
        straight.update(6)
        first.update(3)
        saved = first.saved()
        second.engine.load(lambda name, start, count: saved[name][start : start + count], 3)
        second.step, second.norm = 3, first.norm
        second.update(3)
        assert {"model.lm_head.weight.codes", "model.lm_head.weight.scales"} <= saved.keys()
        for name, tensor in straight.saved().items():
            assert torch.equal(second.saved()[name], tensor), name

    def test_sanity_checks_see_codes(self) -> None:
        training = int8_training(update="per_layer").update()
        check_update(training.engine, SINGLE, step=1, lr=0.004, supports=supports_fingerprint(training.engine.module))
        assert "lm_head.weight.codes" in dict(training.engine.replicas())


@pytest.mark.parametrize(
    ("sections", "remedy"),
    [
        ({"reparam": {"method": "full"}}, "reparam.method=sltrain"),
        ({"reparam": {"method": "lowrank"}}, "reparam.method=sltrain"),
        ({"parallel": {"engine": "fsdp"}}, "parallel.engine=ddp"),
        ({"parallel": {"engine": "zero"}}, "parallel.engine=ddp"),
        ({"optim": {"name": "sgd"}}, "optim.name=adamw or adam"),
        ({"optim": {"name": "adafactor"}}, "optim.name=adamw or adam"),
        ({"optim": {"master_weights": True}, "train": {"dtype": "bf16"}}, "optim.master_weights=false"),
        ({"train": {"dtype": "mixed"}}, "train.dtype=bf16 or fp32"),
        ({"train": {"compile": True}}, "train.compile=false"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with_is_refused(sections: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"reparam.weight_bits.*{remedy}"):
        model_config(**sections)
