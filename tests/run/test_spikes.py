"""Spikes: skipped on all ranks alike, or rewound; the same in a run that was resumed, and under every engine."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.parallel.engine import Engine
from sltrain_dist.train import loop
from sltrain_dist.train.step import Rows, forward_backward
from tests.distributed import whole_run
from tests.distributed.launch import launch_each
from tests.support.runs import (
    Corpus,
    final_tensors,
    metrics,
    outcome,
    tiny_config,
    train_here,
    write_config,
)

STEPS = 40
SETTINGS = {"spike_window": 16, "spike_threshold": 0.5, "spike_limit": 30}
"""A threshold within the usual scatter, so that many updates are spikes by themselves."""


def written(corpus: Corpus, folder: Path, **sections: dict[str, Any]) -> Path:
    train = {"steps": STEPS, "spike": "skip", **SETTINGS, **sections.pop("train", {})}
    optim = {"lr": 1e-4, "schedule": "constant", "warmup_steps": 2, **sections.pop("optim", {})}
    values = tiny_config(corpus, train=train, optim=optim, eval={"every": 0}, checkpoint={"every": 10, "keep": 9})
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return write_config(folder / "config.yaml", values)


def lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "loss" in line]


def numbers(run: Path) -> list[tuple[float, ...]]:
    return [tuple(line[key] for key in ("step", "loss", "grad_norm", "lr", "tokens", "spikes")) for line in lines(run)]


def disturb(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[int, Rows], bool], factor: float = math.nan) -> None:
    """Multiplies the losses of some batches, chosen by their number in this process, from 1, and their rows."""
    taken = itertools.count(1)

    def changed(engine: Engine, rows: Rows, *args: Any, **kwargs: Any) -> tuple[float, int]:
        loss, tokens = forward_backward(engine, rows, *args, **kwargs)
        return (loss * factor if chosen(next(taken), rows) else loss), tokens

    monkeypatch.setattr(loop, "forward_backward", changed)


def test_a_skipped_update_changes_nothing_but_the_counters(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SGD, whose updates depend on nothing else: from the skipped update on as if its learning rate were 0."""
    config = written(corpus, tmp_path, optim={"name": "sgd", "lr": 0.05}, train={"steps": 12})
    with monkeypatch.context() as patch:
        disturb(patch, lambda batch, rows: batch == 7)
        assert train_here(config, tmp_path / "skipped") == 0
    with monkeypatch.context() as patch:
        original = loop.learning_rate
        patch.setattr(loop, "learning_rate", lambda optim, at: 0.0 if at.step == 6 else original(optim, at))
        assert train_here(config, tmp_path / "idle", "train.spike=off") == 0
    skipped, idle = lines(tmp_path / "skipped"), lines(tmp_path / "idle")
    assert [line["spikes"] for line in skipped] == 6 * [0] + 6 * [1]
    assert skipped[6]["loss"] == "NaN"
    for i in (*range(6), *range(7, 12)):
        assert (skipped[i]["loss"], skipped[i]["tokens"]) == (idle[i]["loss"], idle[i]["tokens"])


def resumed(whole: Path, step: int, run: Path) -> Path:
    """Returns a run directory that holds nothing but one checkpoint of another run."""
    name = f"step_{step:08}"
    shutil.copytree(whole / "checkpoints" / name, run / "checkpoints" / name)
    return run


@pytest.mark.parametrize("bits", [32, 8])
def test_a_resumed_run_skips_the_same(corpus: Corpus, tmp_path: Path, bits: int) -> None:
    config = written(corpus, tmp_path, optim={"state_bits": bits})
    whole = tmp_path / "whole"
    assert train_here(config, whole) == 0
    spikes = [line["spikes"] for line in lines(whole)]
    assert spikes[15] == 0 and spikes[29] >= 3 and spikes[-1] - spikes[29] >= 3
    run = resumed(whole, 30, tmp_path / "resumed")
    assert train_here(config, run) == 0
    assert numbers(run) == numbers(whole)[30:]
    assert final_tensors(run) == final_tensors(whole)


def test_a_rewound_run_goes_on_behind_the_spike(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(corpus, tmp_path, train={"spike": "rewind", "spike_threshold": 50.0, "steps": 30})
    runs = {}
    for spike in ("rewind", "off"):
        with monkeypatch.context() as patch:
            disturb(patch, lambda batch, rows: batch in (5, 27), 100.0)
            assert train_here(config, tmp_path / spike, f"train.spike={spike}") == 0
        runs[spike] = lines(tmp_path / spike)
    made, plain = runs["rewind"], runs["off"]
    assert [line["step"] for line in made] == list(range(1, 31))
    # Batch 5 comes before there are enough to know what is usual. Batches 21 to 27 are gone.
    assert [line["spikes"] for line in made] == 20 * [0] + 10 * [1]
    keys = ("loss", "grad_norm", "tokens")
    assert [[line[key] for key in keys] for line in made[:20]] == [[line[key] for key in keys] for line in plain[:20]]
    assert made[20]["lr"] == plain[20]["lr"] and made[20]["loss"] != plain[20]["loss"]
    assert made[20]["tokens"] - made[19]["tokens"] == plain[27]["tokens"] - plain[26]["tokens"]


def test_a_resumed_run_goes_back_as_far(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that goes on from a checkpoint which a spike had led back to."""
    config = written(corpus, tmp_path, train={"spike": "rewind", "spike_threshold": 50.0})
    disturb(monkeypatch, lambda batch, rows: int(rows.sum()) % 9 == 0, 100.0)
    whole = tmp_path / "whole"
    assert train_here(config, whole) == 0
    spikes = [line["spikes"] for line in lines(whole)]
    assert spikes[-1] >= 2
    for step in (20, 30):
        run = resumed(whole, step, tmp_path / f"from-{step}")
        assert train_here(config, run) == 0
        assert numbers(run) == numbers(whole)[step:]
        assert final_tensors(run) == final_tensors(whole)


def test_too_many_spikes_end_the_run(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = written(corpus, tmp_path, train={"spike_limit": 2})
    disturb(monkeypatch, lambda batch, rows: batch >= 7)
    assert train_here(config, tmp_path / "run") == 4
    assert [line["spikes"] for line in lines(tmp_path / "run")] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert "number 3 in a row without progress" in outcome(tmp_path / "run")["reason"]


def test_per_layer_updates_are_rewound_or_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_layer = {"update": "per_layer"}
    config = written(corpus, tmp_path, optim=per_layer, train={"spike": "rewind", "spike_threshold": 50.0})
    assert train_here(config, tmp_path / "refused", "train.spike=skip") == 2
    disturb(monkeypatch, lambda batch, rows: batch == 27, 100.0)
    assert train_here(config, tmp_path / "rewound") == 0
    assert [line["spikes"] for line in lines(tmp_path / "rewound")] == 20 * [0] + 20 * [1]
    disturb(monkeypatch, lambda batch, rows: batch == 4)
    assert train_here(config, tmp_path / "early") == 4
    assert "no checkpoint to go back to yet" in outcome(tmp_path / "early")["reason"]


ENGINES = {"fsdp": "rewind", "zero1": "skip", "zero3": "rewind"}


@pytest.fixture(scope="module")
def on_two_ranks(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each engine, and with the configuration of each answer."""
    folder = tmp_path_factory.mktemp("engines")
    runs = []
    for engine, spike in ENGINES.items():
        train = {"spike": spike, "spike_threshold": {"skip": 0.5, "rewind": 1.8}[spike]}
        config = written(corpus, folder / spike, train=train)
        name, stage = engine[:4], engine[4:] or "1"
        overrides = (f"parallel.engine={name}", *([f"parallel.zero_stage={stage}"] if name == "zero" else []))
        runs.append((config, folder / engine, *overrides))
    launch_each(whole_run, runs, ranks=[2])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_answers_alike(on_two_ranks: Path, tmp_path: Path, engine: str) -> None:
    """On two ranks, as in one process."""
    assert train_here(on_two_ranks / ENGINES[engine] / "config.yaml", tmp_path / "one") == 0
    one, two = numbers(tmp_path / "one"), numbers(on_two_ranks / engine)
    assert one[-1][-1] >= 1
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
