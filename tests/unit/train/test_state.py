"""Which settings a run may change when it resumes, or when it starts from another run's weights."""

from __future__ import annotations

from typing import Any

import pytest

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import CheckpointError, ConfigError
from sltrain_dist.train.state import check_resumable, check_weights_fit


def config(**sections: Any) -> Config:
    return build_config({"seed": 3, **sections, "train": {"steps": 9, **sections.get("train", {})}})


class TestSupportSeed:
    def test_default(self) -> None:
        assert config().support_seed == 3
        assert config(reparam={"support_seed": 7}).support_seed == 7

    def test_the_supports_of_an_earlier_run_are_kept(self) -> None:
        branch = config(seed=5).with_supports_of(config())
        assert (branch.seed, branch.support_seed) == (5, 3)
        again = config(seed=8).with_supports_of(branch)
        assert (again.seed, again.support_seed) == (8, 3)
        assert config(seed=5, reparam={"support_seed": 7}).with_supports_of(config()).support_seed == 7
        assert config().with_supports_of(config()) == config()

    def test_a_dense_run_has_none_to_keep(self) -> None:
        full = config(reparam={"method": "full"})
        assert config(seed=5).with_supports_of(full).support_seed == 5
        assert config(seed=5, reparam={"method": "full"}).with_supports_of(config()).reparam.support_seed is None

    def test_resuming(self) -> None:
        """It may be written out or left out, but not changed."""
        named = config(reparam={"support_seed": 3})
        assert check_resumable(config(), named, "x") == check_resumable(named, config(), "x") == []
        branch = config(seed=5, reparam={"support_seed": 3})
        assert check_resumable(branch, config(seed=5).with_supports_of(branch), "x") == []
        with pytest.raises(CheckpointError, match=r"\(reparam.support_seed: 3 → 7\)"):
            check_resumable(config(), config(reparam={"support_seed": 7}), "x")
        with pytest.raises(CheckpointError, match=r"\(seed: 3 → 4\)"):
            check_resumable(config(), config(seed=4).with_supports_of(config()), "x")


class TestWeightsFit:
    @pytest.mark.parametrize("method", ["sltrain", "full", "lowrank"])
    def test_what_may_change(self, method: str) -> None:
        before = config(reparam={"method": method})
        now = config(
            seed=5,
            model={"init_std": 0.1},
            reparam={"method": method, "path": "factored"},
            optim={"name": "sgd", "lr": 0.5},
            data={"seq_len": 512},
            train={"dtype": "fp32", "global_batch": 64},
        )
        assert check_weights_fit(before, now, "x") == []
        longer = config(model={"rope_theta": 5e5}, reparam={"method": method})
        assert check_weights_fit(before, longer, "x") == ["model.rope_theta: 10000.0 in the checkpoint, 500000.0 here"]

    def test_how_weights_are_trained_may_differ(self) -> None:
        restarts = {"restart_every": 50, "restart_warmup": 5, "restart_states": "factors"}
        assert check_weights_fit(config(), config(reparam=restarts), "x") == []
        assert check_weights_fit(config(reparam=restarts), config(), "x") == []

    @pytest.mark.parametrize(
        ("before", "now"),
        [(a, b) for a in ("sltrain", "full", "lowrank") for b in ("sltrain", "full", "lowrank") if a != b],
    )
    def test_every_two_methods(self, before: str, now: str) -> None:
        own: dict[str, Any] = {"dense_layers": [0]} if now != "full" else {}
        own |= {"rank": 64, "alpha": 7.0, "density": 0.1, "support": "blocks", "support_seed": 9}
        assert check_weights_fit(config(reparam={"method": before}), config(reparam={"method": now, **own}), "x") == [
            f"reparam.method: '{before}' in the checkpoint, '{now}' here"
        ]

    @pytest.mark.parametrize(
        ("before", "now", "expected"),
        [
            ({}, {"model": {"num_layers": 4}}, "model.num_layers: 8 in the checkpoint, 4 here"),
            ({}, {"model": {"vocab_size": 31_000}}, "model.vocab_size: 32000 in the checkpoint, 31000 here"),
            ({}, {"model": {"num_heads": 4}}, "model.num_heads: 8 in the checkpoint, 4 here"),
            ({}, {"model": {"tie_head": True}}, "model.tie_head: False in the checkpoint, True here"),
            ({}, {"reparam": {"rank": 64}}, "reparam.rank: 128 in the checkpoint, 64 here"),
            ({}, {"reparam": {"alpha": 16.0}}, "reparam.alpha: 32.0 in the checkpoint, 16.0 here"),
            ({}, {"reparam": {"density": 0.1}}, "reparam.density: 0.03 in the checkpoint, 0.1 here"),
            ({}, {"reparam": {"support": "blocks"}}, "reparam.support: 'random' in the checkpoint, 'blocks' here"),
            ({}, {"reparam": {"dense_layers": [0]}}, "reparam.dense_layers: [] in the checkpoint, [0] here"),
            ({}, {"reparam": {"support_seed": 7}}, "reparam.support_seed: 3 in the checkpoint, 7 here"),
            ({}, {"reparam": {"weight_bits": 8}}, "reparam.weight_bits: 16 in the checkpoint, 8 here"),
            (
                {"reparam": {"method": "full"}},
                {"reparam": {"weight_bits": 8}},
                "reparam.weight_bits: 16 in the checkpoint, 8 here",
            ),
            (
                {"reparam": {"method": "full"}},
                {"model": {"hidden_size": 256}},
                "model.hidden_size: 512 in the checkpoint, 256 here",
            ),
        ],
    )
    def test_what_may_not(self, before: dict[str, Any], now: dict[str, Any], expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            check_weights_fit(config(**before), config(seed=5, **now), "runs/a/step")
        assert str(caught.value) == (
            f"checkpoint.init_from = runs/a/step: its weights do not fit this run ({expected}); set these as in the "
            "checkpoint, or start without checkpoint.init_from"
        )
