"""MLflow tracking in a background thread: a slow, broken or absent server never slows or stops training."""

from __future__ import annotations

import importlib
import logging
import os
import queue
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from sltrain_dist.config.run_files import MLFLOW_ARTIFACTS, MLFLOW_DATABASE, MLFLOW_RUN_ID
from sltrain_dist.config.schema import TrackingConfig

Status = Literal["FINISHED", "FAILED", "KILLED"]

_ENVIRONMENT = {
    # Retries would make an overloaded server worse.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # Training jobs open only connections that the user asked for.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Messages of migrations and links would break the progress bar; failures reach the user through `warn`.
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Defaults for variables that the user has not set."""

_DATABASES = ("sqlite", "mysql", "postgresql", "mssql")
_THREAD = "sltrain-mlflow"
_QUEUE_SIZE = 10_000
_LINES_PER_REQUEST = 50
_METRICS_PER_REQUEST = 1000  # MLflow's own limits
_PARAMS_PER_REQUEST = 100
_COMPARED_CHARS = 5000  # MLflow truncates values at 6000 characters


class _Line(NamedTuple):
    step: int
    time_ms: int
    metrics: dict[str, float]


class Destination(NamedTuple):
    """Where a run is tracked: as configured, else as set by MLflow's variables, else in the run directory."""

    uri: str
    """URI of the tracking server or database."""
    experiment: str
    """Name or id of the experiment."""
    by_id: bool
    """Whether `experiment` is an id."""
    database: Path | None
    """The run's own SQLite file, if that is the destination."""
    variables: tuple[str, ...]
    """MLflow's environment variables that determined the destination."""

    @staticmethod
    def of(tracking: TrackingConfig, run_dir: Path, environ: Mapping[str, str] = os.environ) -> Destination:
        """Returns the destination of a run in `run_dir`."""
        database = None
        uri = tracking.mlflow_uri or environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            database = run_dir.resolve() / MLFLOW_DATABASE
            uri = _sqlite_uri(database)
        name, number = environ.get("MLFLOW_EXPERIMENT_NAME"), environ.get("MLFLOW_EXPERIMENT_ID")
        by_id = not tracking.experiment and not name and bool(number)
        experiment = tracking.experiment or name or number or "sltrain"
        candidates = (
            ("MLFLOW_TRACKING_URI", not tracking.mlflow_uri and database is None),
            ("MLFLOW_EXPERIMENT_NAME", not tracking.experiment and bool(name)),
            ("MLFLOW_EXPERIMENT_ID", by_id),
        )
        return Destination(uri, experiment, by_id, database, tuple(name for name, is_used in candidates if is_used))

    def __str__(self) -> str:
        """Describes the server, the experiment and the variables that set them, without passwords."""
        experiment = f"experiment {'with id ' if self.by_id else ''}{self.experiment}"
        why = f"  (from {', '.join(self.variables)})" if self.variables else ""
        return f"{_without_password(self.uri)}, {experiment}{why}"


class MlflowTracker:
    """One MLflow run: parameters at the start, metrics per log line, files, a status at the end.

    `log` only puts a line into a bounded queue; a daemon thread talks to MLflow. A failure there is reported
    once through `warn`, on the caller's thread, and ends the tracking, not the training. The constructor, not
    the thread, imports MLflow, although that takes seconds: a process that forks data workers while another
    thread imports modules can pass them import locks that are never released.

    A resumed run continues its MLflow run. MLflow can neither delete metrics nor change parameters:
    repeated updates appear twice, and changed parameters are recorded as tags
    `resumed.<step>.<key>`.

    Args:
        tracking: Server, experiment and run name; see :class:`Destination`.
        run_dir: Directory of the run's id, and by default of the database and artifacts. Must exist.
        params: The configuration, flattened to dotted keys.
        resumed_step: The update after which the run resumes; 0 for a new run.
        warn: Receives one line of text.
        close_timeout_s: Seconds that `close` waits for queued lines. None: 5 for a server, which may hang; 60 for
            a database file, whose creation alone can take several seconds on a busy machine.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        run_dir: Path,
        params: Mapping[str, object],
        *,
        resumed_step: int,
        warn: Callable[[str], None],
        close_timeout_s: float | None = None,
    ) -> None:
        self._tracking = tracking
        self._run_dir = run_dir.resolve()
        self._params = {key: _without_password(str(value)) for key, value in params.items()}
        self._resumed_step = resumed_step
        self._warn = warn
        self._destination = Destination.of(tracking, run_dir)
        self._uri = self._destination.uri
        local = self._uri.startswith("sqlite")
        self._close_timeout_s = close_timeout_s if close_timeout_s is not None else 60.0 if local else 5.0
        self._queue: queue.Queue[_Line | Path | Status] = queue.Queue(_QUEUE_SIZE)
        self._run_id: str | None = None
        self._connected = threading.Event()
        self._failure: str | None = None
        self._active = False
        self._where: str | None = None
        self._warned_of_full_queue = False
        try:
            _import_mlflow(self._uri)
            _check_sqlite_file(self._uri)
        except Exception as error:  # an installation can be broken in any way
            self._fail(error)
            self._report_failure()
            return
        self._active = True
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues the metrics of one line. Returns at once."""
        self._report_failure()
        if not self._active:
            return
        self._put(_Line(step, int(time.time() * 1000), dict(metrics)))

    def attach(self, path: Path) -> None:
        """Queues a file to be stored with the run as it is when its turn comes. Returns at once."""
        self._report_failure()
        if self._active:
            self._put(path)

    def wait_for_id(self, timeout_s: float) -> str | None:
        """Waits for the connection; returns the id of the MLflow run, or None if there is none after `timeout_s`."""
        if self._active:
            self._connected.wait(timeout_s)
            self._report_failure()
        return self._run_id if self._active else None

    def _put(self, item: _Line | Path) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            if not self._warned_of_full_queue:
                self._warn("MLflow is slower than training; lines beyond its queue are only in metrics.jsonl")
                self._warned_of_full_queue = True

    def close(self, status: Status) -> str | None:
        """Ends the MLflow run, and waits a few seconds for queued lines. May be called twice.

        Returns:
            The command or address to view the run, if MLflow has stored all of it; else None.
        """
        if self._active:
            deadline = time.monotonic() + self._close_timeout_s
            try:
                self._queue.put(status, timeout=self._close_timeout_s)
                self._thread.join(max(0.0, deadline - time.monotonic()))
            except queue.Full:
                pass  # the thread is still alive, which is reported below
            if self._thread.is_alive() and self._failure is None:
                timeout = f"{self._close_timeout_s:.0f} s"
                self._fail(TimeoutError(f"it did not store all lines within {timeout} after the end"))
        tracked = self._active and self._failure is None
        self._report_failure()
        self._active = False
        return self._where if tracked else None

    def _fail(self, error: BaseException) -> None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0] if len(lines[0]) <= 300 else f"{lines[0][:297]}..."
        self._failure = _without_password(
            f"MLflow tracking to {self._uri} is off, training is not affected: {reason}; "
            "tracking.mlflow=false silences this"
        )
        self._connected.set()

    def _report_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure, self._active = self._failure, None, False
            self._warn(failure)

    # The methods below run in the background thread.

    def _run(self) -> None:
        try:
            client, run_id = self._connect()
            self._run_id = run_id
            self._connected.set()
            while True:
                lines, item = self._next_lines()
                self._send(client, run_id, lines)
                if isinstance(item, Path):
                    client.log_artifact(run_id, str(item))
                elif item is not None:
                    client.set_terminated(run_id, item)
                    self._where = self._viewer(client, run_id)
                    return
        except Exception as error:  # MLflow's plugins and databases raise errors of any type
            self._fail(error)

    def _next_lines(self) -> tuple[list[_Line], Path | Status | None]:
        """Waits for an item; returns the lines up to the first other item, and that item if it has come."""
        lines: list[_Line] = []
        item = self._queue.get()
        while isinstance(item, _Line):
            lines.append(item)
            if len(lines) == _LINES_PER_REQUEST or self._queue.empty():
                return lines, None
            item = self._queue.get_nowait()
        return lines, item

    def _send(self, client: Any, run_id: str, lines: list[_Line]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, line.time_ms, line.step) for line in lines for name, value in line.metrics.items()
        ]
        for start in range(0, len(metrics), _METRICS_PER_REQUEST):
            client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_REQUEST], synchronous=True)

    def _connect(self) -> tuple[Any, str]:
        """Returns a client, and the id of the run named in run_dir or of a new run."""
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        run = self._existing_run(client) if self._resumed_step else None
        if run is None:
            run = client.create_run(
                self._experiment_id(client),
                run_name=self._tracking.run_name or self._run_dir.name,
                tags={
                    "mlflow.source.name": "sltrain_dist",
                    "run_dir": str(self._run_dir),
                    **({"mlflow.parentRunId": self._tracking.mlflow_parent} if self._tracking.mlflow_parent else {}),
                },
            )
            (self._run_dir / MLFLOW_RUN_ID).write_text(f"{run.info.run_id}\n", encoding="utf-8")
        run_id: str = run.info.run_id
        known = run.data.params
        new = [Param(key, value) for key, value in self._params.items() if key not in known]
        changed = [
            RunTag(f"resumed.{self._resumed_step}.{key}", value)
            for key, value in self._params.items()
            if key in known and known[key][:_COMPARED_CHARS] != value[:_COMPARED_CHARS]
        ]
        for start in range(0, len(new), _PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=new[start : start + _PARAMS_PER_REQUEST], synchronous=True)
        for start in range(0, len(changed), _PARAMS_PER_REQUEST):
            client.log_batch(run_id, tags=changed[start : start + _PARAMS_PER_REQUEST], synchronous=True)
        return client, run_id

    def _existing_run(self, client: Any) -> Any | None:
        """Returns the run named in run_dir, with its status reset to running; None if the server does not have it."""
        from mlflow.exceptions import MlflowException

        path = self._run_dir / MLFLOW_RUN_ID
        if not path.exists():
            return None
        run_id = path.read_text(encoding="utf-8").strip()
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run.info.lifecycle_stage != "active":
            return None
        client.update_run(run_id, status="RUNNING")
        return run

    def _viewer(self, client: Any, run_id: str) -> str:
        """Returns how to view the run: the command for a database, or the page on the server."""
        if self._uri.startswith(_DATABASES):
            return f"mlflow ui --backend-store-uri {shlex.quote(_without_password(self._uri))}"
        if self._uri.startswith("http"):
            experiment = client.get_run(run_id).info.experiment_id
            return f"{_without_password(self._uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
        return f"run {run_id} in {_without_password(self._uri)}"

    def _experiment_id(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        name = self._destination.experiment
        if self._destination.by_id:
            return name
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # A server stores artifacts itself.
            artifacts = (self._run_dir / MLFLOW_ARTIFACTS).as_uri() if self._destination.database else None
            try:
                return str(client.create_experiment(name, artifact_location=artifacts))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)  # another run has just created it
        return str(experiment.experiment_id)


def _import_mlflow(uri: str) -> None:
    """Imports the modules that the background thread needs, without their log output."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    importlib.import_module("mlflow.tracking")
    if uri.startswith(_DATABASES):
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    logging.getLogger("urllib3.connectionpool").addFilter(_is_from_elsewhere)


def _is_from_elsewhere(record: logging.LogRecord) -> bool:
    """Returns False for records of the MLflow thread, which hides urllib3's warnings of retries there."""
    return record.threadName != _THREAD


def _sqlite_uri(path: Path) -> str:
    """Returns the URI of a database file, with `%`, `?` and `#` escaped."""
    escaped = re.sub("[%?#]", lambda special: quote(special[0]), str(path))
    # MLflow makes the (still escaped) parent directory of "sqlite:///…" URIs, but not if the URI names the driver.
    return f"sqlite:///{path}" if escaped == str(path) else f"sqlite+pysqlite:///{escaped}"


def _check_sqlite_file(uri: str) -> None:
    """Opens a database file once, because MLflow retries for minutes if it cannot be opened."""
    if uri.startswith("sqlite"):
        from sqlalchemy import make_url

        path = make_url(uri).database
        if path and path != ":memory:":
            with Path(path).open("ab"):
                pass


def _without_password(text: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
