"""MLflow: a real database, servers that are not there or hang, and what the user is told."""

from __future__ import annotations

import logging
import math
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import sltrain_dist.tracking.mlflow as module
from sltrain_dist.config.run_files import MLFLOW_RUN_ID
from sltrain_dist.config.schema import TrackingConfig
from sltrain_dist.tracking.mlflow import Destination, MlflowTracker
from tests.support.mlflow_environment import restore_at_the_end


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    restore_at_the_end(monkeypatch)


@pytest.fixture
def warnings() -> list[str]:
    return []


def run_of(run_dir: Path) -> tuple[Any, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(Destination.of(TrackingConfig(), run_dir).uri)
    return client, client.get_run((run_dir / MLFLOW_RUN_ID).read_text().strip())


@pytest.mark.slow
def test_a_run_and_its_resumption(
    tmp_path: Path, warnings: list[str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One test for all that needs a database: making one takes seconds."""
    run_dir = tmp_path / "my run? 25%25 #1"
    run_dir.mkdir()
    params = {"optim.lr": 1e-3, "data.source": ["a", "b"], "eval.source": None, "long": "x" * 7000}
    params |= {f"many.{i}": i for i in range(150)}

    first = MlflowTracker(TrackingConfig(), run_dir, params, resumed_step=0, warn=warnings.append)
    for step in range(1, 301):
        first.log(step, {"loss": 1.0 / step, "grad_norm": math.nan if step == 3 else 1.0})
    where = first.close("FAILED")
    assert first.close("FINISHED") is None  # the first status counts
    assert [path.name for path in tmp_path.iterdir()] == [run_dir.name], "MLflow has written elsewhere"
    assert (run_dir / "mlflow.db").is_file()
    assert where is not None
    *command, uri = shlex.split(where)
    assert command == ["mlflow", "ui", "--backend-store-uri"]
    client, run = run_of(run_dir)
    assert client.tracking_uri == uri
    assert (run.info.run_name, run.info.status) == (run_dir.name, "FAILED")
    assert client.get_experiment(run.info.experiment_id).name == "sltrain"
    assert Path(unquote(run.info.artifact_uri.removeprefix("file://"))).parts[:-2] == (
        *run_dir.parts,
        "mlartifacts",
    )
    assert {key: run.data.params[key] for key in ("optim.lr", "data.source", "eval.source", "many.149")} == {
        "optim.lr": "0.001",
        "data.source": "['a', 'b']",
        "eval.source": "None",
        "many.149": "149",
    }
    assert run.data.params["long"].startswith("x" * 5000)
    assert len(run.data.params) == len(params)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1.0 / step) for step in range(1, 301)]
    assert math.isnan(client.get_metric_history(run.info.run_id, "grad_norm")[2].value)

    changed = params | {"optim.lr": 1e-4, "train.steps": 3000}
    second = MlflowTracker(TrackingConfig(), run_dir, changed, resumed_step=300, warn=warnings.append)
    second.log(301, {"loss": 0.5})
    second.close("FINISHED")
    client, resumed = run_of(run_dir)
    assert resumed.info.run_id == run.info.run_id
    assert resumed.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 301
    assert resumed.data.params["train.steps"] == "3000"
    assert {key: value for key, value in resumed.data.tags.items() if key.startswith("resumed.")} == {
        "resumed.300.optim.lr": "0.0001"
    }

    # A run that starts anew in the same directory is another MLflow run; so is one whose run was deleted.
    for resumed_step in (0, 10):
        old = (run_dir / MLFLOW_RUN_ID).read_text()
        client.delete_run(old.strip())
        third = MlflowTracker(
            TrackingConfig(experiment="other", run_name="named"), run_dir, params, resumed_step=resumed_step, warn=print
        )
        third.close("KILLED")
        _, other = run_of(run_dir)
        assert (run_dir / MLFLOW_RUN_ID).read_text() != old
        assert (other.info.run_name, other.info.status) == ("named", "KILLED")

    assert warnings == []
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


NAMED = TrackingConfig(mlflow_uri="http://user:secret@mine", experiment="sltrain")


@pytest.mark.parametrize(
    ("tracking", "environ", "uri", "experiment", "said"),
    [
        (
            TrackingConfig(),
            {},
            "sqlite:////runs/a/mlflow.db",
            "sltrain",
            "sqlite:////runs/a/mlflow.db, experiment sltrain",
        ),
        (
            TrackingConfig(),
            {"MLFLOW_TRACKING_URI": "http://h:5000", "MLFLOW_EXPERIMENT_NAME": "theirs", "MLFLOW_EXPERIMENT_ID": "7"},
            "http://h:5000",
            "theirs",
            "http://h:5000, experiment theirs  (from MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)",
        ),
        (
            TrackingConfig(mlflow_uri="http://mine"),
            {"MLFLOW_TRACKING_URI": "http://h:5000", "MLFLOW_EXPERIMENT_ID": "7"},
            "http://mine",
            "7",
            "http://mine, experiment with id 7  (from MLFLOW_EXPERIMENT_ID)",
        ),
        (
            NAMED,
            {"MLFLOW_TRACKING_URI": "http://h:5000", "MLFLOW_EXPERIMENT_NAME": "theirs", "MLFLOW_EXPERIMENT_ID": "7"},
            "http://user:secret@mine",
            "sltrain",
            "http://***@mine, experiment sltrain",
        ),
        (TrackingConfig(), {"MLFLOW_TRACKING_URI": ""}, "sqlite:////runs/a/mlflow.db", "sltrain", None),
    ],
)
def test_what_is_configured_wins_over_mlflows_own_variables(
    tracking: TrackingConfig, environ: dict[str, str], uri: str, experiment: str, said: str | None
) -> None:
    destination = Destination.of(tracking, Path("/runs/a"), environ)
    assert (destination.uri, destination.experiment) == (uri, experiment)
    assert said is None or str(destination) == said


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"


def use(tracking: TrackingConfig, run_dir: Path, warnings: list[str], **more: Any) -> float:
    """A short run; returns the longest that a call other than the constructor took, in seconds."""
    tracker = MlflowTracker(tracking, run_dir, {"a": 1}, resumed_step=0, warn=warnings.append, **more)
    longest = 0.0
    for step in range(100):
        start = time.perf_counter()
        tracker.log(step, {"loss": 1.0})
        longest = max(longest, time.perf_counter() - start)
    start = time.perf_counter()
    assert tracker.close("FINISHED") is None, "there is nothing to look at"
    return max(longest, time.perf_counter() - start)


def test_closed_port(tmp_path: Path, warnings: list[str], caplog: pytest.LogCaptureFixture) -> None:
    use(TrackingConfig(mlflow_uri=closed_port()), tmp_path, warnings)
    (warning,) = warnings
    assert warning.startswith("MLflow tracking to http://***@127.0.0.1:")
    assert "training is not affected" in warning
    assert "tracking.mlflow=false" in warning
    assert "secret" not in warning
    assert "\n" not in warning
    assert caplog.records == []


def test_hanging_server(tmp_path: Path, warnings: list[str], silent_server: str) -> None:
    longest = use(TrackingConfig(mlflow_uri=silent_server), tmp_path, warnings, close_timeout_s=0.5)
    assert longest < 2.0
    assert ["did not store all lines within" in warning for warning in warnings] == [True]
    for thread in threading.enumerate():
        assert thread.daemon or thread is threading.main_thread()


def test_time_limits_of_servers_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str) -> None:
    for key in module._ENVIRONMENT:
        monkeypatch.delenv(key)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracking = TrackingConfig(mlflow_uri=silent_server)
    tracker = MlflowTracker(tracking, tmp_path, {}, resumed_step=0, warn=print, close_timeout_s=0.0)
    import os

    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"  # the user's
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    tracker.close("FINISHED")
    assert MlflowTracker(tracking, tmp_path, {}, resumed_step=0, warn=print)._close_timeout_s == 5.0


def test_full_queue(tmp_path: Path, warnings: list[str], silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE_SIZE", 10)
    longest = use(TrackingConfig(mlflow_uri=silent_server), tmp_path, warnings, close_timeout_s=0.3)
    assert longest < 2.0
    assert len(warnings) == 2
    assert warnings[0].startswith("MLflow is slower than training")
    assert "did not store all lines" in warnings[1]


@pytest.mark.parametrize("place", ["absent/mlflow.db", "file/mlflow.db"])
def test_database_that_cannot_be_opened(tmp_path: Path, warnings: list[str], place: str) -> None:
    (tmp_path / "file").write_text("")
    use(TrackingConfig(mlflow_uri=f"sqlite:///{tmp_path / place}"), tmp_path, warnings)
    assert len(warnings) == 1
    assert "mlflow.db" in warnings[0]


def test_no_mlflow(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")

    monkeypatch.setattr(module.importlib, "import_module", absent)
    use(TrackingConfig(), tmp_path, warnings)
    assert len(warnings) == 1
    assert "No module named 'mlflow'" in warnings[0]
    assert list(tmp_path.iterdir()) == []


def test_failure_while_logging(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        calls = 0

        def log_batch(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            raise RuntimeError("database is locked\n(and much more)")

    client = Client()
    monkeypatch.setattr(MlflowTracker, "_connect", lambda self: (client, "id"))
    tracker = MlflowTracker(TrackingConfig(), tmp_path, {}, resumed_step=0, warn=warnings.append)
    tracker.log(1, {"loss": 1.0})
    tracker._thread.join(10)
    assert warnings == []  # told on the caller's thread, at its next call
    for step in range(2, 50):
        tracker.log(step, {"loss": 1.0})
    tracker.close("FINISHED")
    assert len(warnings) == 1
    assert ": database is locked; tracking.mlflow=false" in warnings[0]
    assert client.calls == 1


def test_lines_are_sent_together_within_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connected, sent, ended = threading.Event(), [], []

    class Client:
        def log_batch(self, _: str, *, metrics: list[Any], synchronous: bool) -> None:
            assert synchronous
            sent.append([(metric.step, metric.key) for metric in metrics])

        def set_terminated(self, _: str, status: str) -> None:
            ended.append(status)

    def connect(_: MlflowTracker) -> tuple[Any, str]:
        connected.wait(10)
        return Client(), "id"

    monkeypatch.setattr(MlflowTracker, "_connect", connect)
    tracker = MlflowTracker(TrackingConfig(), tmp_path, {}, resumed_step=0, warn=pytest.fail)
    names = [f"m{i}" for i in range(30)]
    for step in range(60):
        tracker.log(step, dict.fromkeys(names, 1.0))
    connected.set()
    tracker.close("FINISHED")
    assert [len(request) for request in sent] == [1000, 500, 300]  # 50 lines of 30, in two requests; 10 lines
    assert [entry for request in sent for entry in request] == [(step, name) for step in range(60) for name in names]
    assert ended == ["FINISHED"]


def test_passwords_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MlflowTracker, "_connect", lambda self: (None, "id"))
    params = {"uri": "postgresql://me:secret@host/db", "mail": "a@b.c", "url": "s3://bucket/a@b"}
    tracker = MlflowTracker(TrackingConfig(), tmp_path, params, resumed_step=0, warn=lambda _: None)
    assert tracker._params == params | {"uri": "postgresql://***@host/db"}
