"""Agreement of ranks at the start, and the sanity checks after updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError, SanityError
from sltrain_dist.models.build import build_model, sparse_layers, supports_fingerprint
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train import agreement
from sltrain_dist.train.agreement import check_agreement, run_identity
from sltrain_dist.train.observers.sanity_checks import check_update
from tests.support.ranks import SINGLE, on_ranks


def config(**values: Any) -> Config:
    model = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_layers": 1, "num_heads": 4}
    reparam = {"rank": 6, "density": 0.1, "alpha": 12.0}
    train = {"steps": 1, "dtype": "fp32"}
    return build_config({"model": model, "reparam": reparam, "train": train, **values})


class TestAgreement:
    def test_equal_ranks(self) -> None:
        on_ranks(3, lambda env: check_agreement(env, run_identity(config())))

    @pytest.mark.parametrize(
        ("stray", "expected"),
        [
            (lambda: run_identity(config(seed=1)), r"seed \(ranks 0, 1: 0, rank 2: 1\)"),
            (lambda: run_identity(config(data={"seq_len": 64})), r"data\.seq_len \(ranks 0, 1: 256, rank 2: 64\)"),
            (
                lambda: {**run_identity(config()), "code": "0.0.9, abc"},
                r"code \(ranks 0, 1: '0\.1\.0, .*rank 2: '0\.0\.9",
            ),
            (lambda: {**run_identity(config()), "torch": "2.11.0"}, r"torch \(.*rank 2: '2\.11\.0'"),
            (lambda: {**run_identity(config()), "more": 1}, r"more \(ranks 0, 1: nothing, rank 2: 1\)"),
        ],
    )
    def test_a_stray_rank_is_named_on_all(self, stray: Callable[[], dict[str, Any]], expected: str) -> None:
        def on_rank(env: Environment) -> str:
            with pytest.raises(ConfigError) as raised:
                check_agreement(env, stray() if env.rank == 2 else run_identity(config()))
            return str(raised.value)

        messages = on_ranks(3, on_rank)
        assert len(set(messages)) == 1
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(messages[0])

    def test_only_what_differs_is_named(self) -> None:
        with pytest.raises(ConfigError) as raised:
            on_ranks(2, lambda env: check_agreement(env, {"alike": 1, "other": env.rank}))
        assert "alike" not in str(raised.value).partition("differ")[2]

    def test_many_ranks_are_cut_short(self) -> None:
        with pytest.raises(ConfigError, match=r"ranks 0, 2, 4, 6 and 2 more: 0, ranks 1, 3, 5, 7 and 2 more: 1"):
            on_ranks(12, lambda env: check_agreement(env, {"parity": env.rank % 2}))

    def test_a_changed_line_of_code_is_another_version(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        before = agreement.code_version()
        package = tmp_path / "sltrain_dist"
        (package / "train").mkdir(parents=True)
        (package / "train" / "agreement.py").write_text("x = 1\n")
        monkeypatch.setattr(agreement, "__file__", str(package / "train" / "agreement.py"))
        one = agreement.code_version()
        (package / "train" / "agreement.py").write_text("x = 2\n")
        assert len({before, one, agreement.code_version()}) == 3


class Faulty(DDPEngine):
    """An engine whose replicas go astray on one rank."""

    def __init__(self, settings: Config, env: Environment) -> None:
        super().__init__(build_model(settings), settings.optim, SINGLE)
        self.rank = env.rank

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        for index, (name, tensor) in enumerate(super().replicas()):
            if index == 1 and self.rank == 1:
                bits = tensor.clone().view(torch.int32)
                bits.view(-1)[3] ^= 1  # the last bit of one value
                yield name, bits.view(torch.float32)
            else:
                yield name, tensor


class TestSanity:
    def updated(self, lr: float = 0.1) -> tuple[DDPEngine, str]:
        settings = config()
        engine = DDPEngine(build_model(settings), settings.optim, SINGLE)
        ids = torch.arange(32).view(2, 16) % 61
        engine.begin_update(lr, None)
        engine.micro_step(ids, ids, 0.1, last=True)
        engine.update()
        return engine, supports_fingerprint(engine.module)

    def test_a_good_update(self) -> None:
        engine, supports = self.updated()
        check_update(engine, SINGLE, step=1, lr=0.1, supports=supports)

    def test_gradients_that_are_held(self) -> None:
        engine, supports = self.updated()
        next(engine.module.parameters()).grad = torch.ones(61, 32)
        with pytest.raises(
            SanityError, match=r"update 7, rank 0: gradients are not freed .*model\.embed_tokens\.weight"
        ):
            check_update(engine, SINGLE, step=7, lr=0.1, supports=supports)

    def test_another_learning_rate(self) -> None:
        engine, supports = self.updated(lr=0.2)
        with pytest.raises(SanityError, match=r"learning rate is \[0\.2\], but the schedule's is 0\.1"):
            check_update(engine, SINGLE, step=1, lr=0.1, supports=supports)

    def test_changed_supports(self) -> None:
        engine, supports = self.updated()
        layer = next(sparse_layers(engine.module))[1]
        positions = next(layer.support.buffers())
        positions[0] += 1
        with pytest.raises(SanityError, match="the supports have changed"):
            check_update(engine, SINGLE, step=1, lr=0.1, supports=supports)

    def test_replicas_that_differ_by_one_bit(self) -> None:
        settings = config()
        supports = supports_fingerprint(build_model(settings))

        def on_rank(env: Environment) -> None:
            engine = Faulty(settings, env)
            engine.begin_update(0.1, None)
            engine.update()
            check_update(engine, env, step=3, lr=0.1, supports=supports)

        with pytest.raises(SanityError, match=r"update 3, rank 1: its replicas differ from rank 0's: model\.layers\.0"):
            on_ranks(2, on_rank)
