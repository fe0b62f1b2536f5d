"""The MLflow run of a study, under which the runs of its trials are shown (no torch)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sltrain_dist.config.run_files import MLFLOW_RUN_ID
from sltrain_dist.config.schema import Config, TrackingConfig
from sltrain_dist.study.comparison import ArmResult
from sltrain_dist.study.study_file import Study
from sltrain_dist.tracking.mlflow import Destination, MlflowTracker, Status

_CONNECT_S = 120.0
"""Longest wait for the connection. Making a database takes several seconds on a busy machine."""
_CLOSE_S = 60.0


class ParentRun:
    """The MLflow run of a study. It goes on when the study is started again; without MLflow it does nothing.

    Args:
        study: The study.
        warn: Receives one line of text if MLflow cannot be used.
    """

    def __init__(self, study: Study, warn: Callable[[str], None]) -> None:
        tracking = study.example(next(iter(study.file.arms))).tracking
        self._settings: dict[str, Any] = {}
        self._tracker: MlflowTracker | None = None
        if not tracking.mlflow:
            return
        directory = study.directory
        self._tracker = MlflowTracker(
            tracking.model_copy(update={"run_name": directory.name}),
            directory,
            _params(study),
            resumed_step=1 if (directory / MLFLOW_RUN_ID).exists() else 0,
            warn=warn,
            close_timeout_s=_CLOSE_S,
        )
        run_id = self._tracker.wait_for_id(_CONNECT_S)
        if run_id is not None:
            self._settings = {"mlflow_parent": run_id, **_database(tracking, directory)}

    def adjust(self, config: Config) -> Config:
        """Returns a trial's configuration with the tracking of its run under this one."""
        tracking = config.tracking.model_copy(update=self._settings)
        return config.model_copy(update={"tracking": tracking})

    def record(self, arms: Sequence[ArmResult], files: Sequence[Path]) -> None:
        """Records the results of the arms, with the budget as MLflow's step, and stores files."""
        if self._tracker is None:
            return
        for arm in arms:
            means = {"perplexity": arm.perplexity.mean if arm.perplexity else None}
            means |= {"memory_bytes": arm.memory_bytes, "tokens_per_s": arm.tokens_per_s, "lr": arm.lr}
            self._tracker.log(arm.budget, {f"{key}.{arm.arm}": each for key, each in means.items() if each is not None})
        for path in files:
            self._tracker.attach(path)

    def close(self, status: Status) -> str | None:
        """Ends the run; returns the command or address to view it, if MLflow has stored all of it."""
        return None if self._tracker is None else self._tracker.close(status)


def _database(tracking: TrackingConfig, directory: Path) -> dict[str, str]:
    """Returns the setting that sends the trials' runs to the study's own database, unless there is a server."""
    destination = Destination.of(tracking, directory)
    return {"mlflow_uri": destination.uri} if destination.database is not None else {}


def _params(study: Study) -> dict[str, str]:
    """Returns the study's file as MLflow's parameters: its keys, and the configuration by section."""
    values = study.file.model_dump(mode="json")
    base = values.pop("base")
    params = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return params | {f"base.{key}": json.dumps(value) for key, value in base.items()}
