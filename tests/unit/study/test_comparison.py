"""The choice of the learning rate, the order of trials, and the numbers that are reported."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from sltrain_dist.errors import ConfigError, DataError, ExitCode
from sltrain_dist.study.agenda import Choice, choose_lr, known_trials
from sltrain_dist.study.comparison import Spread, compare, comparison_table
from sltrain_dist.study.plots import loss_curve
from sltrain_dist.study.run_study import StudyOutcome, read_results, run_study, write_plots, write_results
from sltrain_dist.study.study_directory import check_same_study, claimed
from sltrain_dist.study.study_file import Study
from sltrain_dist.study.trial_result import TrialStatus
from tests.support.studies import finish, make_study

BUDGET = 3840
LOSSES = {"full": {0.01: 3.0, 0.001: 3.5}, "blocks": {0.01: 3.4, 0.001: 3.2}}
"""Of the tuning trials. The reported trials have other losses, whose best learning rate is the other one."""


def tune(study: Study) -> None:
    for arm, losses in LOSSES.items():
        for trial in study.tuning(arm, BUDGET):
            finish(trial, losses[trial.lr])


def finish_all(study: Study) -> None:
    tune(study)
    for arm, lr in (("full", 0.01), ("blocks", 0.001)):
        for trial in study.reported(arm, BUDGET, lr):
            finish(trial, 3.0 + 0.1 * trial.seed + (0.05 * trial.seed if arm == "blocks" else 0.0))


def test_the_learning_rate_is_chosen_on_the_tuning_seed_alone(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    tune(study)
    for arm, losses in LOSSES.items():  # reported trials of every learning rate, as if they were left from before
        for lr in losses:
            for trial in study.reported(arm, BUDGET, lr):
                finish(trial, 9.0 - losses[lr])
    results = read_results(study)
    assert choose_lr(study, "full", BUDGET, results) == Choice(0.01, at_edge=True)
    assert choose_lr(study, "blocks", BUDGET, results) == Choice(0.001, at_edge=True)
    assert {name for name in results if "seed0" not in name} == {
        f"full-{BUDGET}-lr0.01-seed1",
        f"full-{BUDGET}-lr0.01-seed2",
        f"blocks-{BUDGET}-lr0.001-seed1",
        f"blocks-{BUDGET}-lr0.001-seed2",
    }


def test_the_middle_of_three_learning_rates_is_at_no_edge_and_the_smaller_of_equals_is_chosen(tmp_path: Path) -> None:
    study = make_study(tmp_path, lrs=[0.1, 0.01, 0.001], arms={"a": None})
    for trial, loss in zip(study.tuning("a", BUDGET), (3.0, 3.0, 4.0), strict=True):
        finish(trial, loss)
    assert choose_lr(study, "a", BUDGET, read_results(study)) == Choice(0.01, at_edge=False)


@pytest.mark.parametrize(("code", "expected"), [(4, Choice(0.001, at_edge=True)), (1, None), (75, None), (None, None)])
def test_a_tuning_trial_that_diverged_is_not_chosen_and_one_that_failed_leaves_no_choice(
    tmp_path: Path, code: int | None, expected: Choice | None
) -> None:
    study = make_study(tmp_path)
    for trial in study.tuning("blocks", BUDGET):
        finish(trial, 2.0, code=code if trial.lr == 0.01 else 0)
    assert choose_lr(study, "blocks", BUDGET, read_results(study)) == expected


def test_trials_come_tuning_first_then_seed_by_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    assert len(known_trials(study, {})) == 4
    tune(study)
    results = read_results(study)
    assert [(trial.arm, trial.seed) for trial in known_trials(study, results)] == [
        *(("full", 0), ("full", 0), ("blocks", 0), ("blocks", 0)),
        *(("full", 1), ("blocks", 1), ("full", 2), ("blocks", 2)),
    ]
    assert [results[trial.name].status for trial in known_trials(study, results)][4:] == [TrialStatus.NEW] * 4


def test_an_arm_that_diverges_at_every_learning_rate_is_reported_as_such(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for arm in LOSSES:
        for trial in study.tuning(arm, BUDGET):
            finish(trial, 3.0, code=4 if arm == "blocks" else 0)
    results = read_results(study)
    _, blocks = compare(study, results)
    assert (blocks.lr, blocks.seeds, blocks.diverged, blocks.perplexity) == (None, 0, 2, None)
    assert len(known_trials(study, results)) == 4 + 2
    table = comparison_table(study, compare(study, results))
    assert "0, 2 diverged" in table and "Arms without a learning rate diverged" in table


def test_numbers(tmp_path: Path) -> None:
    """Means and ranges over the reported seeds; differences by seed."""
    study = make_study(tmp_path, reference="full")
    finish_all(study)
    results = read_results(study)
    full, blocks = compare(study, results)
    assert full.perplexity == Spread(pytest.approx(31.5), pytest.approx(31.0), pytest.approx(32.0))
    assert blocks.perplexity == Spread(pytest.approx(32.25), pytest.approx(31.5), pytest.approx(33.0))
    assert full.loss_difference is None
    assert blocks.loss_difference == Spread(pytest.approx(0.075), pytest.approx(0.05), pytest.approx(0.1))
    assert (blocks.seeds, blocks.diverged, blocks.memory_bytes) == (2, 0, 2_000_000)
    assert (blocks.predicted_memory_bytes, blocks.tokens_per_s) == (2_100_000, 100.0)
    assert blocks.parameters != full.parameters and full.parameters == 37_280

    write_results(study, results)
    rows = list(csv.DictReader((study.directory / "results.csv").open()))
    assert [row["role"] for row in rows] == ["tuning"] * 4 + ["reported"] * 4
    assert {row["run"]: float(row["eval_loss"]) for row in rows} == {
        name: result.eval_loss for name, result in results.items()
    }
    (row,) = (row for row in rows if row["run"] == f"blocks-{BUDGET}-lr0.001-seed2")
    assert (row["arm"], row["budget"], row["lr"], row["seed"]) == ("blocks", str(BUDGET), "0.001", "2")
    assert (row["tokens"], row["eval_tokens"], row["elapsed_s"]) == (str(BUDGET), "50", "20.0")
    table = (study.directory / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in table[3].split("|")][1:] == [
        *("blocks", "3,840", "0.001*", "2", "32.25", "31.50–33.00", "+0.0750 (+0.0500 … +0.1000)"),
        *("28.0k", "2.00 MB", "2.10 MB", "100", ""),
    ]


def test_a_loss_that_is_not_finite_at_the_end_is_a_divergence(tmp_path: Path) -> None:
    study = make_study(tmp_path, arms={"a": {"lrs": [0.01]}})
    (trial, other) = study.reported("a", BUDGET, 0.01)
    finish(trial, 3.0)
    finish(other, 3.0)
    path = other.run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"eval_loss": 3.0', '"eval_loss": "NaN"'))
    (arm,) = compare(study, read_results(study))
    assert (arm.seeds, arm.diverged) == (1, 1)


def test_evaluation_data_that_changed_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    tune(study)
    (trial, _) = study.reported("full", BUDGET, 0.01)
    finish(trial, 3.0, eval_tokens=49)
    with pytest.raises(DataError, match=r"was evaluated on 49 tokens, and full-3840-lr0\.01-seed0 on 50"):
        write_results(study, read_results(study))


def test_a_finished_study_starts_nothing(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with claimed(study):
        pass
    finish_all(study)
    said: list[str] = []
    outcome = run_study(study, 1, None, said.append)
    assert outcome.exit_code is ExitCode.DONE and said == []
    assert {path.name for path in study.directory.iterdir()} == {
        *("runs", "study.yaml", "results.csv", "table.md", "loss.png", "memory.png"),
    }
    assert all((study.directory / name).read_bytes()[:4] == b"\x89PNG" for name in ("loss.png", "memory.png"))


def test_exit_codes(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    tune(study)
    results = read_results(study)
    assert StudyOutcome(results, None).exit_code is ExitCode.DONE
    (failed, stopped) = study.reported("full", BUDGET, 0.01)
    finish(failed, 3.0, code=3)
    outcome = StudyOutcome(read_results(study), None)
    assert outcome.exit_code is ExitCode.UNEXPECTED
    assert [(each.trial.name, each.exit_code) for each in outcome.failed] == [(failed.name, 3)]
    finish(stopped, 3.0, code=75)
    assert StudyOutcome(read_results(study), None).exit_code is ExitCode.STOPPED_EARLY


def test_pictures_of_nothing_are_not_drawn(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    tune(study)
    assert write_plots(study, read_results(study)) == []
    assert not list(study.directory.glob("*.png"))


def test_pictures_of_two_budgets(tmp_path: Path) -> None:
    """A panel for each budget; an arm that has no result yet at one of them is left out there."""
    study = make_study(tmp_path, arms={"a": {"lrs": [0.01]}, "b": {"lrs": [0.01]}}, budgets=[BUDGET, 2 * BUDGET])
    for arm, budget in (("a", BUDGET), ("b", BUDGET), ("a", 2 * BUDGET)):
        for trial in study.reported(arm, budget, 0.01):
            finish(trial, 3.0)
    results = read_results(study)
    assert [(arm.arm, arm.budget, arm.seeds) for arm in compare(study, results)] == [
        *(("a", BUDGET, 2), ("b", BUDGET, 2), ("a", 2 * BUDGET, 2), ("b", 2 * BUDGET, 0)),
    ]
    assert [path.name for path in write_plots(study, results)] == ["loss.png", "memory.png"]


def test_curves_are_means_over_seeds(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    finish_all(study)
    curve = loss_curve(study, "full", BUDGET, read_results(study))
    assert curve is not None
    assert curve.tokens == [384.0 * step for step in range(1, 11)] and curve.elapsed_s[-1] == 20.0
    assert curve.loss[-1] == pytest.approx(3.15)


OTHER = [
    ((), {"budgets": [7680]}, "budgets = [3840] there, [7680] here"),
    ((), {"tuning_seed": 9}, "tuning_seed = 0 there, 9 here"),
    ((), {"tuning_tokens": 1920}, "tuning_tokens = None there, 1920 here"),
    (("optim.clip=0.5",), {}, "arm full has optim.clip = 0.0 there, 0.5 here"),
    (("data.source=x",), {}, "arm full has data.source = 'embedded' there, 'x' here"),
    ((), {"arms": {"blocks": {"reparam.support": "random"}}}, "arm blocks has reparam.support = 'blocks' there"),
]


@pytest.mark.parametrize(("overrides", "changes", "message"), OTHER, ids=[message[:30] for *_, message in OTHER])
def test_results_of_another_study_are_refused(
    tmp_path: Path, overrides: tuple[str, ...], changes: dict[str, object], message: str
) -> None:
    with claimed(make_study(tmp_path)):
        pass
    before = (tmp_path / "study" / "study.yaml").read_bytes()
    with (
        pytest.raises(ConfigError, match="holds the results of another study") as error,
        claimed(make_study(tmp_path, *overrides, **changes)),
    ):
        pass
    assert message in str(error.value) and "choose another study_dir" in str(error.value)
    assert (tmp_path / "study" / "study.yaml").read_bytes() == before


def test_a_study_may_grow(tmp_path: Path) -> None:
    """By arms, seeds and learning rates; and what changes no result may change. An arm that goes and comes back is
    still compared."""
    with claimed(make_study(tmp_path)):
        pass
    arms = {"blocks": {"reparam.support": "blocks"}, "lowrank": {"reparam.method": "lowrank"}}
    grown = make_study(tmp_path, "checkpoint.every=7", "data.workers=2", arms=arms, seeds=[1, 2, 3], lrs=[0.1, 0.01])
    with claimed(grown):
        pass
    with pytest.raises(ConfigError, match=r"arm full has reparam\.method"):
        check_same_study(make_study(tmp_path, arms={"full": {"reparam.method": "lowrank"}}))


def test_one_study_at_a_time(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with claimed(study), pytest.raises(ConfigError, match="is in use by another"), claimed(study):
        pass


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    study.directory.mkdir()
    (study.directory / "results.csv").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"holds the results of another study, without study.yaml"), claimed(study):
        pass
    (study.directory / "study.yaml").write_text("arms: 3\n")
    with pytest.raises(ConfigError, match=r"study.yaml is damaged: it has no arms"), claimed(study):
        pass


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    trial = study.tuning("full", BUDGET)[0]
    finish(trial, 3.0)
    (trial.run_dir / "metrics.jsonl").write_bytes(b'{"step": 0, \xff\n')
    with pytest.raises(DataError, match=r"metrics.jsonl is damaged .* so that the trial is run again"):
        read_results(study)


def test_results_can_be_read_while_a_trial_runs(tmp_path: Path) -> None:
    """An incomplete line and a null exit code."""
    study = make_study(tmp_path)
    trial = study.tuning("full", BUDGET)[0]
    finish(trial, 3.0, code=None)
    with (trial.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    result = read_results(study)[trial.name]
    assert (result.status, result.step, result.eval_loss) == (TrialStatus.UNFINISHED, 10, None)
    assert json.loads((trial.run_dir / "exit.json").read_text())["code"] is None
    assert result.initial_eval_loss is not None and math.isclose(result.initial_eval_loss, 5.5)
