"""What an MLflow tracker sets for its process."""

from __future__ import annotations

import pytest

import sltrain_dist.tracking.mlflow as module


def restore_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes at the end what the tracker sets for its process, and hides the user's own servers."""
    for key, value in module._ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    for key in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(key, raising=False)
