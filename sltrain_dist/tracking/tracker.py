"""The tracker, to which the training loop reports everything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sltrain_dist.config.run_files import LOG, METRICS, SAMPLES
from sltrain_dist.config.schema import TrackingConfig
from sltrain_dist.files import writing
from sltrain_dist.tracking.console import Console, Screen, Sections, Value
from sltrain_dist.tracking.jsonl import JsonLines
from sltrain_dist.tracking.meters import Clock, Eta
from sltrain_dist.tracking.mlflow import MlflowTracker, Status


class RunTracker:
    """Console, log.txt, metrics.jsonl and MLflow, on the main rank; does nothing on the others.

    Only the constructor raises. Later failures never stop training; each is reported once.

    Args:
        tracking: The tracking section of the configuration.
        run_dir: Directory of the files. Made if it does not exist.
        config_flat: The resolved configuration, flattened to dotted keys; MLflow's parameters.
        total_steps: Length of the run in updates; None: `total_tokens` is the length.
        total_tokens: Length of the run in tokens, used if `total_steps` is None.
        is_main: Whether this is the rank that reports.
        resumed_step: The update after which the run resumes; 0 for a new run.
        with_samples: Whether there will be samples.
        screen: Console to print to; None: standard output.
        clock: A monotonic clock in seconds, for the remaining time.

    Raises:
        StorageError: `run_dir` cannot be written.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        run_dir: Path,
        *,
        config_flat: Mapping[str, object],
        total_steps: int | None,
        total_tokens: int | None,
        is_main: bool,
        resumed_step: int = 0,
        with_samples: bool = False,
        screen: Screen | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._is_main = is_main
        if not is_main:
            return
        self._by_tokens = total_steps is None
        total = total_tokens if total_steps is None else total_steps
        self._eta = Eta(total, clock) if total is not None else None
        self._failed: list[JsonLines] = []
        with writing(f"run_dir = {run_dir}"):
            run_dir.mkdir(parents=True, exist_ok=True)
            self._console = Console(
                run_dir / LOG,
                tracking.progress,
                total=total,
                unit="tokens" if self._by_tokens else "steps",
                screen=screen,
            )
            self._jsonl = JsonLines(run_dir / METRICS, resumed_step, self.warn)
            self._samples = JsonLines(run_dir / SAMPLES, resumed_step, self.warn) if with_samples else None
        self._mlflow = (
            MlflowTracker(tracking, run_dir, config_flat, resumed_step=resumed_step, warn=self.warn)
            if tracking.mlflow
            else None
        )

    def summary(self, sections: Sections) -> None:
        """Prints a summary of the run: rows of (name, value) by title."""
        if self._is_main:
            self._console.summary(sections)

    def note(self, message: str) -> None:
        """Prints information for the user."""
        if self._is_main:
            self._console.note(message)

    def warn(self, message: str) -> None:
        """Prints a warning."""
        if self._is_main:
            self._console.warn(message)

    def go_back(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after an update to which the run goes back, as a resumed run does."""
        if self._is_main:
            self._with_files(lambda file: file.go_back(step))

    def progress(self, step: int, tokens: int, loss: float) -> None:
        """Updates the progress bar; cheap enough for every update.

        Args:
            step: Number of updates made.
            tokens: Non-padding tokens trained on since the run's beginning, over all ranks.
            loss: Loss of this update.
        """
        if self._is_main:
            if self._eta is not None:
                self._eta.update(tokens if self._by_tokens else step)
            self._console.progress(step, tokens, loss, self._eta_s)

    def train(self, record: Mapping[str, float | int | None]) -> None:
        """Records a training line.

        Args:
            record: `step`, `loss`, `lr`, `grad_norm`, `tokens` (cumulative), `tokens_per_s`, `data_wait_s`,
                `peak_memory_bytes`, `elapsed_s`, and others such as `mfu` (a fraction of 1).
        """
        if self._is_main:
            self._record(record)
            self._console.train(record, self._eta_s)

    def evaluation(self, record: Mapping[str, float | int | None]) -> None:
        """Records an evaluation line: `step`, `eval_loss`, `eval_perplexity`, `eval_tokens`."""
        if self._is_main:
            self._record(record)
            self._console.evaluation(record)

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Records the continuations of prompts after an update, as (prompt, continuation); before its evaluation line.

        An evaluation that was interrupted is repeated, and may have recorded them already.
        """
        if not self._is_main:
            return
        for prompt, continuation in texts:
            self._console.note(f"step {step}  {prompt!r} goes on with {continuation!r}")
        assert self._samples is not None, "the tracker was made without samples"
        written = [{"prompt": prompt, "continuation": continuation} for prompt, continuation in texts]

        def write_once(file: JsonLines) -> None:
            if not file.holds(step, "samples"):
                file.write({"step": step, "samples": written})

        self._try(self._samples, write_once)
        if self._mlflow is not None:
            self._mlflow.attach(self._samples.path)

    def has_evaluation(self, step: int) -> bool:
        """Returns whether metrics.jsonl has an evaluation after this update, from which the run was resumed."""
        return self._is_main and self._jsonl.holds(step, "eval_loss")

    def close(self, status: Status) -> None:
        """Ends the tracking: stops the bar and waits a few seconds for MLflow. May be called twice."""
        if self._is_main:
            where = self._mlflow.close(status) if self._mlflow is not None else None
            if where is not None and status == "FINISHED":
                self._console.note(f"look at the run:     {where}")
            self._with_files(JsonLines.close)
            self._console.close()

    def sync(self) -> None:
        """Waits until all lines so far are on disk; call it before a checkpoint, whose updates must not lack lines."""
        if self._is_main:
            self._with_files(JsonLines.sync)
            self._console.sync()

    @property
    def _eta_s(self) -> float | None:
        return self._eta.seconds if self._eta is not None else None

    def _record(self, record: Mapping[str, Value]) -> None:
        self._try(self._jsonl, lambda file: file.write(record))
        step = record["step"]
        assert isinstance(step, int)
        if self._mlflow is not None:
            known = {name: value for name, value in record.items() if isinstance(value, int | float)}
            known.pop("step")
            self._mlflow.log(step, known)

    def _with_files(self, act: Callable[[JsonLines], None]) -> None:
        for file in filter(None, (self._jsonl, self._samples)):
            self._try(file, act)

    def _try(self, file: JsonLines, act: Callable[[JsonLines], None]) -> None:
        """Calls `act`; warns once for each file if lines could not be written."""
        try:
            act(file)
        except OSError as error:
            if file not in self._failed:
                self.warn(f"lines are missing from {file.path.name}: {error}")
                self._failed.append(file)
