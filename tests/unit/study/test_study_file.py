"""What a study's file may say, and the trials that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.errors import ConfigError
from sltrain_dist.study.agenda import count_trials
from sltrain_dist.study.study_file import load_study
from tests.support.studies import make_study, study_values, write_study


def test_trials(tmp_path: Path) -> None:
    """Every trial is a configuration of its own: the base, the arm's changes, and what the study sets."""
    study = make_study(tmp_path, "optim.clip=0.5", "seeds=[7]", budgets=[3840, 7680], tuning_tokens=1920)
    assert count_trials(study) == 2 * 2 + 2 * 2 * 1  # one choice of the learning rate for both budgets
    (trial,) = study.reported("blocks", 7680, 0.001)
    assert trial.name == "blocks-7680-lr0.001-seed7" and trial.run_dir == tmp_path / "study" / "runs" / trial.name
    config = trial.config
    assert (config.seed, config.optim.lr, config.train.steps, config.train.tokens) == (7, 0.001, None, 7680)
    assert (config.reparam.support, config.reparam.method, config.reparam.rank) == ("blocks", "sltrain", 6)
    assert config.optim.clip == 0.5 and config.model.hidden_size == 32
    assert [(each.tokens, each.lr, each.seed) for each in study.tuning("full", 7680)] == [
        (1920, 0.01, 0),
        (1920, 0.001, 0),
    ]
    assert study.tuning("full", 7680)[0].config.reparam.method == "full"


def test_an_arm_may_have_learning_rates_of_its_own(tmp_path: Path) -> None:
    """A single one is no choice, and takes no tuning trial."""
    study = make_study(tmp_path, arms={"base": None, "gentle": {"lrs": [0.0001], "optim": {"clip": 1.0}}})
    assert len(study.tuning("base", 3840)) == 2 and study.tuning("gentle", 3840) == []
    assert study.lrs("gentle") == [0.0001] and study.example("gentle").optim.clip == 1.0


def test_a_preset_may_be_the_base(tmp_path: Path) -> None:
    base = {"preset": "llama_60m", "eval": {"source": "embedded"}}
    study = make_study(tmp_path, base=base, budgets=[10**9])
    config = study.example("blocks")
    assert (config.model.hidden_size, config.train.steps, config.train.tokens) == (512, None, 10**9)
    assert config.optim.lr == 0.01


WRONG: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"arm": {}}, (), "arm: unknown key; a study has study_dir, base, arms"),
    ({"arms": {}}, (), "arms: Dictionary should have at least 1 item"),
    ({"arms": {"a/b": {}}}, (), "an arm's name is"),
    ({"arms": {"a": {"lrs": []}}}, (), "arms.a.lrs: List should have at least 1 item"),
    ({"lrs": [0.1, 0.1]}, (), "lrs has 0.1 twice"),
    ({"lrs": ["fast"]}, (), "lrs.0: should be a valid number"),
    ({"seeds": [0, 1]}, (), "seeds has 0, which is tuning_seed"),
    ({"reference": "none"}, (), "reference = 'none' is not an arm; the arms are full, blocks"),
    ({"study_dir": "$NOT_SET_HERE/x"}, (), "the environment variable NOT_SET_HERE is not set"),
    ({"base": []}, (), "base: should be a valid dictionary"),
    ({}, ("seeds=[x]",), "command line: seeds.0: should be a valid integer"),
    ({}, ("arms.x={}",), "cannot set a part of arms; change the file"),
    ({}, ("base.optim.clip=1",), "cannot set a part of base; write section.key=value"),
    ({}, ("optim.clipp=1",), "command line: optim.clipp = 1: unknown key; did you mean optim.clip?"),
    ({}, ("optim.lr=1",), "command line: optim.lr is set by lrs; leave it out here"),
    ({}, ("train.steps=1",), "command line: train.steps is set by budgets"),
    ({"arms": {"a": {"seed": 1}}}, (), "arm a: seed is set by seeds and tuning_seed"),
    ({"arms": {"a": {"reparam.rank": 64}}}, (), "arm a: reparam.rank = 64: is larger than the smallest dimension"),
    ({"arms": {"a": {"reparam": 3}}}, (), "arm a: reparam = 3: this is a section"),
    ({"arms": {"a": {"reparam.method": "relora"}}}, (), "arm a: reparam.method = 'relora' never merges"),
    ({"arms": {"a": {}, "b": {"data": {"seq_len": 48}}}}, (), "arm b: data.seq_len = 48, but 24 in arm a"),
    ({"arms": {"a": {}, "b": {"eval.tokens": 9}}}, (), "arm b: eval.tokens = 9, but 10000000 in arm a"),
    ({"arms": {"a": {}, "b": {"train.global_batch": 4}}}, (), "on the same batches"),
    ({}, ("eval.source=null",), "a study compares validation losses; set eval.source in base"),
    ({}, ("optim.warmup_steps=20",), "optim.warmup_steps = 20 updates take 3,840 tokens"),
]


@pytest.mark.parametrize(("changes", "overrides", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_mistakes_are_told_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make_study(tmp_path, *overrides, **changes)
    assert message in str(error.value)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("key", ["study_dir", "arms", "lrs", "seeds", "budgets"])
def test_what_is_missing_is_named(tmp_path: Path, key: str) -> None:
    values = {name: value for name, value in study_values(tmp_path).items() if name != key}
    with pytest.raises(ConfigError, match=f"{key}: Field required"):
        load_study(write_study(tmp_path / "study.yaml", values))


def test_differences_that_do_not_touch_the_batches_are_allowed(tmp_path: Path) -> None:
    arms = {"a": None, "b": {"train.micro_batch": 2, "data.workers": 0, "eval.micro_batch": 1, "model.num_layers": 1}}
    assert make_study(tmp_path, arms=arms).example("b").train.micro_batch == 2
