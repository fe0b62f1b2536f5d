"""The MLflow run of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sltrain_dist.tracking.mlflow as module
from sltrain_dist.config.run_files import MLFLOW_RUN_ID
from sltrain_dist.study.comparison import compare
from sltrain_dist.study.parent_run import ParentRun
from sltrain_dist.study.run_study import read_results, write_plots, write_results
from sltrain_dist.tracking.mlflow import MlflowTracker
from tests.support.mlflow_environment import restore_at_the_end
from tests.support.studies import finish, make_study, study_values


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    restore_at_the_end(monkeypatch)


@pytest.mark.slow
def test_trials_are_shown_under_one_run_with_the_results(tmp_path: Path) -> None:
    """One test for all that needs a database: making one takes seconds."""
    from mlflow.tracking import MlflowClient

    base = {**study_values(tmp_path)["base"], "tracking": {}}
    study = make_study(tmp_path, base=base, arms={"a": {"lrs": [0.01]}})
    trials = study.reported("a", 3840, 0.01)
    for trial in trials:
        finish(trial, 3.0)
    results = read_results(study)
    files = write_results(study, results)
    warnings: list[str] = []

    parent = ParentRun(study, warnings.append)
    adjusted = parent.adjust(trials[0].config)
    assert adjusted.model_copy(update={"tracking": trials[0].config.tracking}) == trials[0].config
    child = MlflowTracker(adjusted.tracking, trials[0].run_dir, {}, resumed_step=0, warn=warnings.append)
    child.log(1, {"loss": 3.0})
    assert child.close("FINISHED") is not None
    parent.record(compare(study, results), [*files, *write_plots(study, results)])
    assert parent.close("FINISHED") is not None and warnings == []

    client = MlflowClient(f"sqlite:///{study.directory}/mlflow.db")
    run_id = (study.directory / MLFLOW_RUN_ID).read_text().strip()
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("study", "FINISHED")
    assert run.data.metrics["perplexity.a"] == 30.0 and run.data.metrics["memory_bytes.a"] == 2_000_000
    assert run.data.params["seeds"] == "[1, 2]"
    names = {file.path for file in client.list_artifacts(run_id)}
    assert names == {"results.csv", "table.md", "loss.png", "memory.png"}
    (shown,) = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert (shown.info.run_name, shown.data.metrics) == (trials[0].name, {"loss": 3.0})
    assert not (trials[0].run_dir / "mlflow.db").exists()

    again = ParentRun(study, warnings.append)
    assert again.adjust(trials[0].config) == adjusted
    again.close("FINISHED")


def test_without_mlflow_nothing_is_tracked(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    parent = ParentRun(study, pytest.fail)
    config = study.example("full")
    assert parent.adjust(config) == config and parent.close("FINISHED") is None


def test_without_a_connection_trials_are_tracked_as_other_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> Any:
        raise ImportError("no such module")

    monkeypatch.setattr(module, "_import_mlflow", fail)
    warnings: list[str] = []
    study = make_study(tmp_path, base={**study_values(tmp_path)["base"], "tracking": {}})
    study.directory.mkdir()
    parent = ParentRun(study, warnings.append)
    config = study.example("full")
    assert parent.adjust(config) == config and parent.close("FAILED") is None
    assert len(warnings) == 1 and "no such module" in warnings[0]
