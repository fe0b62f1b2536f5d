"""The parts of the training loop: weighting, evaluation, counters, what may change on resume, and how runs end."""

from __future__ import annotations

import json
import math
import random
import re
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import functional as F

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config, OptimConfig, TrainConfig
from sltrain_dist.data.stream.rows import count_labels, mark_first_tokens
from sltrain_dist.errors import CheckpointError, DataError, DivergedError
from sltrain_dist.models.build import build_model
from sltrain_dist.models.count import count_parameters
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.models.loss import IGNORE
from sltrain_dist.numerics.splitmix import integers
from sltrain_dist.optim.schedule import Progress, learning_rate
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.runtime import launchers
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.runtime.reaper import Process
from sltrain_dist.runtime.stop import StopRequest
from sltrain_dist.tracking.console import format_bytes, format_count
from sltrain_dist.train.divergence import check_finite, not_learning
from sltrain_dist.train.dry_run import made_up_rows
from sltrain_dist.train.evaluate import EvalResult, evaluate
from sltrain_dist.train.state import (
    TrainState,
    check_resumable,
    check_schedule,
    read_saved,
    restore_rng,
    rng_state,
)
from sltrain_dist.train.step import Rows, forward_backward, to_batch
from sltrain_dist.train.summary import summarise
from tests.support.ranks import SINGLE, on_ranks

VOCABULARY, LENGTH = 41, 12


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "model": {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_layers": 1,
            "num_heads": 2,
            "init_std": 0.3,
        },
        "reparam": {"rank": 4, "density": 0.2, "alpha": 8.0},
        "data": {"seq_len": LENGTH},
        "train": {"steps": 10, "micro_batch": 4, "global_batch": 8, "dtype": "fp32"},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if name in values else section
    return build_config(values)


def uneven_rows(count: int) -> Rows:
    """Rows of 2 to `LENGTH` tokens."""
    ids = integers(5, 0, count * (LENGTH + 1), VOCABULARY).astype(np.int32).reshape(count, LENGTH + 1)
    for row in range(count):
        ids[row, 2 + row * 5 % (LENGTH - 1) :] = -1
    return ids


def engine() -> DDPEngine:
    settings = config()
    return DDPEngine(build_model(settings), settings.optim, SINGLE)


def gradients(of: DDPEngine) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in of.module.named_parameters() if p.grad is not None}


def mean_loss(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """Mean over all labels, row by row, with nothing of the code under test but the model's logits."""
    losses = []
    for row in rows.tolist():
        tokens = torch.tensor([[token for token in row if token >= 0]])
        logits = model(tokens[:, :-1])[0]
        losses.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the mean over all labels of eight rows."""
    reference = engine()
    loss = mean_loss(reference.module, uneven_rows(8))
    loss.backward()
    return float(loss.detach()), gradients(reference)


class TestForwardBackward:
    @pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
    def test_any_micro_batch(self, expected: tuple[float, dict[str, torch.Tensor]], micro_batch: int) -> None:
        rows, trained = uneven_rows(8), engine()
        loss, tokens = forward_backward(trained, rows, micro_batch, SINGLE)
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert tokens == np.count_nonzero(rows[:, :-1] >= 0)
        got = gradients(trained)
        assert got.keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_any_number_of_ranks(self, expected: tuple[float, dict[str, torch.Tensor]], ranks: int) -> None:
        rows = uneven_rows(8)

        def on_rank(env: Environment) -> tuple[float, int, dict[str, torch.Tensor]]:
            mine, share = engine(), 8 // ranks
            loss, tokens = forward_backward(mine, rows[env.rank * share : (env.rank + 1) * share], 1, env)
            return loss, tokens, gradients(mine)

        results = on_ranks(ranks, on_rank)
        for loss, tokens, _ in results:
            assert loss == pytest.approx(expected[0], rel=1e-6)
            assert tokens == np.count_nonzero(rows[:, :-1] >= 0)
        for name, gradient in expected[1].items():
            total = torch.stack([each[name] for _, _, each in results]).sum(0)
            torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6)

    def test_the_rows_can_tell_weightings_apart(self, expected: tuple[float, dict[str, torch.Tensor]]) -> None:
        """A mean of micro-batches' means would be another number."""
        model = engine().module
        with torch.no_grad():
            means = [float(mean_loss(model, uneven_rows(8)[start : start + 2])) for start in range(0, 8, 2)]
        assert sum(means) / 4 != pytest.approx(expected[0], rel=1e-3)

    def test_nothing_to_predict(self) -> None:
        rows = np.full((4, LENGTH + 1), -1, dtype=np.int32)
        rows[:, 0] = 7
        with pytest.raises(DataError, match="nothing to predict"):
            forward_backward(engine(), rows, 2, SINGLE)

    def test_batch_of_rows(self) -> None:
        inputs, labels, positions = to_batch(torch.tensor([[3, 4, 5, -1], [6, 7, 8, 9]], dtype=torch.int32))
        assert inputs.tolist() == [[3, 4, 5], [6, 7, 8]]
        assert labels.tolist() == [[4, 5, IGNORE], [7, 8, 9]]
        assert inputs.dtype == labels.dtype == torch.int64
        assert positions is None

    def test_batch_of_marked_rows(self) -> None:
        rows = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 9, 0, -1]], dtype=torch.int32)
        mark_first_tokens(rows, ([0, 0, 1, 1], [2, 4, 0, 3]))
        inputs, labels, positions = to_batch(rows, reset_attention=True)
        assert inputs.tolist() == [[3, 4, 5, 6], [8, 9, 9, 0]]
        assert labels.tolist() == [[4, IGNORE, 6, IGNORE], [9, 9, IGNORE, IGNORE]]
        assert positions is not None
        assert positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
        assert count_labels(rows.numpy()) == 4


class TestEvaluate:
    @pytest.mark.parametrize("ranks", [1, 2, 3, 5])
    @pytest.mark.parametrize("micro_batch", [1, 3, 16])
    def test_any_batch_and_number_of_ranks(self, micro_batch: int, ranks: int) -> None:
        rows, trained = uneven_rows(7), engine()
        with torch.no_grad():
            expected = float(mean_loss(trained.module, rows))
        for result in on_ranks(ranks, lambda env: evaluate(trained, rows, micro_batch, env)):
            assert result.loss == pytest.approx(expected, rel=1e-6)
            assert result.tokens == np.count_nonzero(rows[:, 1:] >= 0)
            assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)

    def test_all_ranks_make_as_many_passes(self) -> None:
        """An engine's forward pass may be a collective."""
        rows = uneven_rows(7)

        class Counting(DDPEngine):
            passes = 0

            def evaluate(self, *batch: torch.Tensor | None) -> torch.Tensor:
                self.passes += 1
                return super().evaluate(*batch)

        def on_rank(env: Environment) -> int:
            settings = config()
            counting = Counting(build_model(settings), settings.optim, SINGLE)
            evaluate(counting, rows, 2, env)
            return counting.passes

        assert on_ranks(3, on_rank) == [2, 2, 2]

    def test_can_be_cut_short_before_any_batch(self) -> None:
        class EnoughError(Exception):
            pass

        def on_rank(env: Environment) -> int:
            calls = 0

            def before_batch() -> None:
                nonlocal calls
                calls += 1
                if env.sum([float(env.rank == 1 and calls == 3)]) == [1.0]:
                    raise EnoughError

            with pytest.raises(EnoughError):
                evaluate(engine(), uneven_rows(20), 2, env, before_batch=before_batch)
            return calls

        assert on_ranks(2, on_rank) == [3, 3]

    def test_leaves_gradients_alone(self) -> None:
        trained = engine()
        evaluate(trained, uneven_rows(4), 2, SINGLE)
        assert gradients(trained) == {}

    def test_huge_loss(self) -> None:
        assert EvalResult(1e4, 1).perplexity == math.inf
        assert math.isnan(EvalResult(math.nan, 1).perplexity)


class TestTrainState:
    def test_counts(self) -> None:
        state = TrainState()
        for tokens in (10, 20, 30):
            state.advance(tokens, warmup_steps=2)
        assert state == TrainState(step=3, tokens=60, warmup_tokens=30)
        assert TypeAdapter(TrainState).validate_python(state.to_dict()) == state

    @pytest.mark.parametrize(("step", "finished"), [(0, False), (9, False), (10, True), (11, True)])
    def test_finished_by_steps(self, step: int, finished: bool) -> None:
        assert TrainState(step=step, tokens=10**9).finished(TrainConfig(steps=10)) is finished

    @pytest.mark.parametrize(("tokens", "finished"), [(0, False), (99, False), (100, True), (101, True)])
    def test_finished_by_tokens(self, tokens: int, finished: bool) -> None:
        assert TrainState(step=10**9, tokens=tokens).finished(TrainConfig(tokens=100)) is finished

    def test_the_last_update_reaches_the_end_of_the_schedule(self) -> None:
        settings = config(optim={"lr": 1.0, "warmup_steps": 3, "min_lr_ratio": 0.1})
        rates = [learning_rate(settings.optim, TrainState(step=step).progress(settings.train, 3)) for step in range(10)]
        assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
        assert rates[-1] == pytest.approx(0.1)
        assert all(after < before for before, after in pairwise(rates[2:]))

    def test_progress_by_tokens(self) -> None:
        train = TrainConfig(tokens=1000)
        assert TrainState(step=1, tokens=100, warmup_tokens=100).progress(train, 2) == Progress(1, 0.1, 0.0)
        assert TrainState(step=5, tokens=500, warmup_tokens=200).progress(train, 2) == Progress(5, 0.5, 0.2)

    def test_a_single_step(self) -> None:
        state = TrainState()
        assert math.isfinite(learning_rate(config().optim, state.progress(TrainConfig(steps=1), 0)))


def wsd(steps: int | None = None, tokens: int | None = None, **optim: Any) -> Config:
    """A run with this length and this schedule."""
    return config(train={"steps": steps, "tokens": tokens}, optim={"schedule": "wsd", **optim})


class TestResumable:
    def test_nothing_changed(self) -> None:
        assert check_resumable(config(), config(), "old") == []

    @pytest.mark.parametrize(
        ("section", "key", "value"),
        [
            ("model", "num_layers", 2),
            ("model", "norm_eps", 1e-5),
            ("reparam", "rank", 5),
            ("reparam", "alpha", 9.0),
            ("reparam", "density", 0.3),
            ("train", "global_batch", 16),
            ("train", "dtype", "bf16"),
            ("optim", "name", "sgd"),
        ],
    )
    def test_mathematics(self, section: str, key: str, value: object) -> None:
        now = config(**{section: {key: value}})
        with pytest.raises(CheckpointError) as caught:
            check_resumable(config(), now, "runs/old")
        before = getattr(getattr(config(), section), key)
        assert f"{section}.{key}: {before!r} → {value!r}" in str(caught.value)
        assert "runs/old belongs to a run with another configuration" in str(caught.value)

    def test_seed(self) -> None:
        with pytest.raises(CheckpointError, match="seed: 0 → 1"):
            check_resumable(config(), config().model_copy(update={"seed": 1}), "old")

    def test_the_rest_is_listed(self) -> None:
        now = config(
            reparam={"path": "materialize"},
            train={"micro_batch": 2, "steps": 20},
            parallel={"engine": "zero", "shard": "all"},
            tracking={"mlflow": False},
        )
        assert sorted(check_resumable(config(), now, "old")) == [
            "parallel.engine: 'ddp' → 'zero'",
            "parallel.shard: 'factors' → 'all'",
            "reparam.path: 'auto' → 'materialize'",
            "tracking.mlflow: True → False",
            "train.micro_batch: 4 → 2",
            "train.steps: 10 → 20",
        ]

    def test_only_the_forbidden_are_in_the_error(self) -> None:
        with pytest.raises(CheckpointError) as caught:
            check_resumable(config(), config(model={"num_layers": 2}, train={"micro_batch": 2}), "old")
        assert "micro_batch" not in str(caught.value)

    def test_wsd_can_be_longer_or_shorter_until_it_decays(self) -> None:
        """100 updates with a decay of the last 20 %: of the numbers 0 to 99, those above 79.2 decay."""
        before = wsd(steps=100)
        changes = (wsd(steps=1000), wsd(steps=90), wsd(steps=None, tokens=8000), wsd(steps=100, decay_ratio=0.01))
        for now in (*changes, wsd(steps=100, decay_type="linear"), config(optim={"schedule": "constant"})):
            check_schedule(before, now, TrainState(step=70, tokens=5000), "old")
            check_schedule(before, now, TrainState(step=1, tokens=80), "old")
            with pytest.raises(CheckpointError, match=r"old is of update 80, where that run's decay has begun"):
                check_schedule(before, now, TrainState(step=80, tokens=5700), "old")
        check_schedule(before, before, TrainState(step=99, tokens=7000), "old")

    @pytest.mark.parametrize(
        ("now", "remedy"),
        [
            ({"steps": 80}, "train.steps=89 or more"),
            ({"steps": 100, "decay_ratio": 0.5}, "train.steps=141 or more"),
            ({"steps": None, "tokens": 6000}, "train.tokens=6250 or more"),
            ({"steps": 100, "decay_ratio": 1.0}, "a lower optim.decay_ratio"),
        ],
    )
    def test_a_new_decay_begins_at_the_checkpoint_at_the_earliest(self, now: dict[str, Any], remedy: str) -> None:
        saved = TrainState(step=70, tokens=5000)
        with pytest.raises(CheckpointError) as caught:
            check_schedule(wsd(steps=100), wsd(**now), saved, "old")
        assert "this configuration's decay has begun" in str(caught.value)
        assert str(caught.value).endswith(f"checkpoint.resume=PATH, or set {remedy}")
        if "decay_ratio" in now:
            assert f"(optim.decay_ratio: 0.2 → {now['decay_ratio']})" in str(caught.value)

    @pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.3, 0.7, 0.9])
    def test_the_length_in_the_remedy_suffices(self, ratio: float) -> None:
        """By rounding, it may be one update more than necessary."""
        for step in range(2, 100):
            saved = TrainState(step=step)
            with pytest.raises(CheckpointError) as caught:
                check_schedule(wsd(steps=10**6), wsd(steps=step + 1, decay_ratio=ratio), saved, "old")
            (steps,) = map(int, re.findall(r"set train\.steps=(\d+) or more", str(caught.value)))
            check_schedule(wsd(steps=10**6), wsd(steps=steps, decay_ratio=ratio), saved, "old")
            with pytest.raises(CheckpointError):
                check_schedule(wsd(steps=10**6), wsd(steps=steps - 2, decay_ratio=ratio), saved, "old")

    def test_other_schedules_change_as_they_like(self) -> None:
        saved = TrainState(step=9, tokens=900)
        check_schedule(config(), config(train={"steps": 20}), saved, "old")
        check_schedule(config(), config(optim={"schedule": "constant"}), saved, "old")
        with pytest.raises(CheckpointError, match=r"optim\.schedule: 'cosine' → 'wsd'"):
            check_schedule(config(), config(optim={"schedule": "wsd"}), saved, "old")


def test_random_states_survive_json() -> None:
    torch.manual_seed(3)
    random.seed(4)
    state = json.loads(json.dumps(rng_state(torch.device("cpu"))))
    expected = torch.rand(3), random.random()
    restore_rng(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


class TestGuard:
    def test_finite(self, tmp_path: Path) -> None:
        check_finite(3.0, 1e30, 4, tmp_path, OptimConfig())

    @pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
    def test_not_finite(self, tmp_path: Path, loss: float, norm: float) -> None:
        with pytest.raises(DivergedError, match=r"update 5 has loss .* there is no checkpoint yet.*Lower optim.lr"):
            check_finite(loss, norm, 4, tmp_path, OptimConfig())

    @pytest.mark.parametrize(("mode", "said"), [("previous_norm", "made in part.*lost"), ("two_pass", "was not made")])
    def test_what_is_left_of_a_per_layer_update(self, tmp_path: Path, mode: str, said: str) -> None:
        optim = OptimConfig(update="per_layer", clip=1.0, clip_mode=mode)
        with pytest.raises(DivergedError, match=said):
            check_finite(1.0, math.nan, 4, tmp_path, optim)


class TestStop:
    @pytest.fixture(autouse=True)
    def in_a_terminal(self) -> Iterator[None]:
        """The tests themselves may run under nohup."""
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGHUP, before)

    @pytest.fixture
    def stop(self, tmp_path: Path) -> Iterator[StopRequest]:
        stop = StopRequest(tmp_path)
        stop.install()
        yield stop
        stop.restore()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
    def test_signal(self, stop: StopRequest, number: signal.Signals) -> None:
        assert stop.reason() is None
        signal.raise_signal(number)
        assert stop.reason() == f"received {number.name}"

    def test_under_nohup_a_closed_terminal_is_no_request(self, tmp_path: Path) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            stop = StopRequest(tmp_path)
            stop.install()
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason() is None
            stop.restore()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_lost_launcher(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stop = StopRequest(tmp_path)
        assert stop.reason() is None
        monkeypatch.setattr(launchers, "_AT_START", (Process(1, "another one", ("torchrun",)),))
        assert stop.reason() == "the launcher of this process is gone (torchrun, process 1)"

    def test_second_interrupt(self, stop: StopRequest) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    def test_signals_are_given_back(self, tmp_path: Path) -> None:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        before = [signal.getsignal(number) for number in numbers]
        stop = StopRequest(tmp_path)
        stop.install()
        assert all(signal.getsignal(n) != handler for n, handler in zip(numbers, before, strict=True))
        stop.restore()
        assert [signal.getsignal(number) for number in numbers] == before

    def test_file(self, tmp_path: Path) -> None:
        stop = StopRequest(tmp_path)
        (tmp_path / "STOP").touch()
        assert stop.reason() == f"found {tmp_path / 'STOP'}"
        stop.acknowledge()
        assert stop.reason() is None
        stop.acknowledge()


def test_made_up_rows() -> None:
    rows = made_up_rows(config(), 0, 4)
    assert rows.shape == (4, LENGTH + 1)
    assert rows.dtype == np.int32
    assert rows.min() >= 0
    assert rows.max() < VOCABULARY
    assert not np.array_equal(rows, made_up_rows(config(), 1, 4))


def test_summary(tmp_path: Path) -> None:
    settings = config(checkpoint={"every": 5})
    sections = summarise(settings, SINGLE, tmp_path, shards=3, resumed_step=4)
    shown = {name: value for rows in sections.values() for name, value in rows}
    counted = count_parameters(settings.model, settings.reparam)
    model: LlamaForCausalLM = build_model(settings)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert shown["sparse values"] == format_count(counted.sparse)
    assert shown["low-rank factors"] == format_count(counted.factors)
    assert shown["parameters"].startswith(format_count(counted.total))
    assert shown["update"] == f"8 sequences = {format_count(8 * LENGTH)} token slots, in 2 micro-batches"
    assert shown["budget"] == "10 updates, 4 made"
    assert "every 5 updates" in shown["checkpoints"]
    assert shown["run directory"] == str(tmp_path)


def test_summary_of_dense_layers(tmp_path: Path) -> None:
    settings = config(model={"num_layers": 3}, reparam={"dense_layers": [0, -1]})
    sections = summarise(settings, SINGLE, tmp_path, shards=3, resumed_step=0)
    shown = {name: value for rows in sections.values() for name, value in rows}
    model = build_model(settings)
    assert shown["dense layers"] == "0, -1"
    assert shown["dense weights"] == format_count(2 * (4 * 16 * 16 + 3 * 16 * 20))
    indices = sum(buffer.nbytes for name, buffer in model.named_buffers() if ".support." in name)
    assert shown["support"] == f"random, {format_bytes(indices)} of indices"


SAVED = {"counters": {"step": 3, "tokens": 60}, "data": {}, "rng": [{"torch": "", "python": ""}], "supports": "ab"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counters": None}, "counters: "),
        ({"counters": {"step": "late"}}, "counters.step: "),
        ({"counters": {"step": 4}}, "state.json is of step 4 instead of 3"),
        ({"data": []}, "data: "),
        ({"rng": {}}, "rng: "),
        ({"rng": [None]}, "rng.0: "),
        ({"supports": 3}, "supports: "),
    ],
)
def test_a_saved_state_that_makes_no_sense(change: dict[str, Any], said: str) -> None:
    saved = read_saved(SAVED, 3, "here")
    assert saved.counters == TrainState(step=3, tokens=60)
    with pytest.raises(CheckpointError, match=f"here is damaged: .*{re.escape(said)}"):
        read_saved({**SAVED, **change}, 3, "here")
    for name in SAVED:
        with pytest.raises(CheckpointError, match=f"state.json: {name}: Field required"):
            read_saved({key: value for key, value in SAVED.items() if key != name}, 3, "here")


@pytest.mark.parametrize("state", [{}, {"torch": "AAAA", "python": "(1, 2)"}, {"torch": "", "python": "("}])
def test_random_number_states_that_are_none(state: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match="random-number states cannot be read"):
        restore_rng(state, torch.device("cpu"))


@pytest.mark.parametrize(
    ("step", "first", "loss", "told"),
    [
        (30, 4.0, 3.5, False),
        (30, 4.0, math.log(VOCABULARY), True),  # dead: it predicts nothing
        (30, 2.0, 2.1, True),  # begun from another run, and worse since
        (30, None, 4.0, True),  # from a checkpoint that does not say how it began
        (1, 4.0, 4.0, False),
        (10, 4.0, 4.1, False),  # of the warm-up
    ],
)
def test_what_is_told_of_a_run_that_learns_nothing(step: int, first: float | None, loss: float, told: bool) -> None:
    said = not_learning(loss, TrainState(step=step, first_loss=first), config(optim={"warmup_steps": 10}))
    assert (said is not None) is told
    if said is not None:
        assert f"after {step} updates the loss is {loss:.3f}" in said
        assert "checkpoint.keep_every" in said
