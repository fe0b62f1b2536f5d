"""Training memory that others have measured on GPUs, and the planner's predictions for the same runs.

The measurements are the rows of docs/reports/public-measurements.csv; `tools/bench_planner.py --public` prints them
beside the predictions. docs/reports/2026-11-27-public-measurements.md explains the columns and the differences.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from benchmarking import table
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sltrain_dist.config.load import build_config, merged, parse_override
from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.device_overhead import SLACK, communicators, outside_bytes
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.result import Estimate
from sltrain_dist.plan.device_memory import parse_device_memory
from sltrain_dist.plan.paper.reference import reference_estimate

MEASUREMENTS = Path(__file__).resolve().parents[1] / "docs/reports/public-measurements.csv"

UNITS = {"GB": 10**9, "GiB": 2**30}

TOLERANCE = 1.05
"""Largest prediction for a run that fitted, as a share of the card's memory."""


def _llama(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None, tied: bool = False
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "tie_head": tied,
    }


MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-7B": PRESETS["llama_7b"]["model"],
    "Llama-2-7B": _llama(32_000, 4096, 11_008, 32, 32),
    "Llama-2-13B": _llama(32_000, 5120, 13_824, 40, 40),
    "Llama-2-70B": _llama(32_000, 8192, 28_672, 80, 64, 8),
    "Llama-3-8B": _llama(128_256, 4096, 14_336, 32, 32, 8),
    "Llama-3-70B": _llama(128_256, 8192, 28_672, 80, 64, 8),
    "Llama-3.1-405B": _llama(128_256, 16_384, 53_248, 126, 128, 8),
    "Llama-3.2-3B": _llama(128_256, 3072, 8192, 28, 24, 8, tied=True),
    "TinyLlama-1.1B": _llama(32_000, 2048, 5632, 22, 32, 4),
    "torchao's Llama2-1B": _llama(32_000, 1536, 6144, 24, 24),
}
"""Sizes of the models with predictions; those of Llama 3 and 3.1 are equal."""

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"activation_checkpointing": "none"},
    "full": {"activation_checkpointing": "full"},
    "every second block": {"activation_checkpointing": "selective", "checkpoint_policy": "blocks"},
    "operators": {"activation_checkpointing": "selective", "checkpoint_policy": "attention"},
}
"""Settings for the recomputation of a run. operators: torchtitan keeps the outputs of attention and of every second
matrix product; `attention`, which keeps only those of attention, is the nearest setting, and a lower bound."""

Text = Annotated[str, Field(min_length=1)]
Unstated = Literal["unstated"]


class Measurement(BaseModel):
    """One row of the file; values that the source does not give are `unstated`.

    Attributes:
        id: Unique name of the row.
        source: Address or arXiv number of the source of the measurement.
        place: Place in the source: page, section, table, commit.
        batch: Sequences per rank and forward pass.
        update: whole, or per_layer where the optimizer steps during the backward pass.
        settings: More settings of the prediction as `section.key=value`, separated by spaces.
        card: The device's memory as `sltrain plan --device-memory` reads it.
        quantity: Measured quantity. outcome: only whether the run fitted.
        how: Method of the measurement.
        planner: Source of the prediction: planner (sltrain_dist.memory), reference (the emulation of the published
            code), or none, where no configuration expresses the run.
        relation: same, or lower bound where the configuration keeps less than the run did.
        difference_bytes: Bytes that the run is known to need beyond the configuration; `cause` derives them.
        matters: The most important assumption.
        cause: Reason why the prediction is far off, or why there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    id: Text
    source: Text
    place: Text
    model: Text
    method: Text
    batch: Annotated[int, Field(gt=0)] | Unstated
    seq_len: Annotated[int, Field(gt=0)] | Unstated
    dtype: Text
    optimizer: Text
    state_bits: Annotated[int, Field(gt=0)] | Literal["none", "unstated"]
    update: Literal["whole", "per_layer", "unstated"]
    recompute: Literal["none", "full", "every second block", "operators", "unstated"]
    compiled: Literal["yes", "no", "unstated"]
    engine: Text
    ranks: Annotated[int, Field(gt=0)] | Unstated
    settings: str
    device: Text
    card: Text
    quantity: Literal["allocated", "active", "reserved", "outcome", "unstated"]
    how: Text
    unit: Literal["GB", "GiB", "none"]
    value: Annotated[float, Field(gt=0)] | Literal["ran", "out of memory"]
    planner: Literal["planner", "reference", "none"]
    relation: Literal["same", "lower bound"]
    difference_bytes: int
    matters: Text
    assumed: Text
    cause: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({isinstance(self.value, float), self.unit in UNITS, self.quantity != "outcome"}) > 1:
            raise ValueError(
                "a number needs a unit and a quantity; ran and out of memory need unit none, quantity outcome"
            )
        if self.planner == "none":
            if not self.cause:
                raise ValueError("cause must say why nothing predicts the run")
        elif "unstated" in (self.batch, self.seq_len, self.ranks, self.update, self.state_bits, self.recompute):
            raise ValueError(
                "a prediction needs every size and setting; replace unstated values, and name them in assumed"
            )
        elif self.model not in MODELS:
            raise ValueError(
                f"model {self.model!r} is unknown; add its sizes to MODELS in tools/public_measurements.py"
            )
        return self

    @property
    def measured_bytes(self) -> float | None:
        """Bytes that were measured; None if only the outcome is known."""
        return self.value * UNITS[self.unit] if isinstance(self.value, float) else None


def read_measurements(path: Path = MEASUREMENTS) -> list[Measurement]:
    """Reads all rows of a file of measurements.

    Raises:
        ConfigError: A row is incomplete, has an unknown value, or the name of another row.
    """
    rows: dict[str, Measurement] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for values in csv.DictReader(file):
            line = f"{path.name}, row {values.get('id') or len(rows) + 1}"
            try:
                row = Measurement.model_validate(values)
            except ValidationError as error:
                problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
                raise ConfigError(f"{line}: {'; '.join(problems)}") from None
            if row.id in rows:
                raise ConfigError(f"{line}: another row has the same id; rename one of them")
            rows[row.id] = row
    return list(rows.values())


def config_of(row: Measurement) -> Config:
    """Returns the configuration that expresses a run.

    Raises:
        ConfigError: No configuration expresses it.
    """
    if row.planner == "none":
        raise ConfigError(row.cause)
    batch, seq_len, ranks = int(row.batch), int(row.seq_len), int(row.ranks)
    values: dict[str, Any] = {
        "model": MODELS[row.model],
        "reparam": {"method": row.method},
        "data": {"seq_len": seq_len, "batching": "pack"},
        "optim": {"name": row.optimizer, "update": row.update},
        "parallel": {"engine": row.engine},
        "train": {
            "steps": 1,
            "micro_batch": batch,
            "global_batch": batch * ranks,
            "dtype": row.dtype,
            "loss_chunk_tokens": 0,
            **RECOMPUTE[row.recompute],
        },
    }
    if row.state_bits != "none":
        values["optim"]["state_bits"] = row.state_bits
    for setting in row.settings.split():
        key, value = parse_override(setting)
        for part in reversed(key):
            value = {part: value}
        values = merged(values, value)
    return build_config(values)


@dataclass(frozen=True)
class Prediction:
    """The planner's prediction for a measured run.

    Attributes:
        row: The measurement.
        predicted_bytes: Predicted bytes of the measured quantity.
        device_bytes: Predicted device memory, with context, NCCL and unused allocator memory.
        card_bytes: Memory of the device.
    """

    row: Measurement
    predicted_bytes: int
    device_bytes: int
    card_bytes: int

    @property
    def error(self) -> float | None:
        """Relative error, positive if too much is predicted; None if only the outcome is known."""
        measured = self.row.measured_bytes
        return None if measured is None else self.predicted_bytes / measured - 1

    @property
    def unexplained_error(self) -> float | None:
        """Relative error after adding the known difference between run and configuration."""
        measured = self.row.measured_bytes
        return None if measured is None else (self.predicted_bytes + self.row.difference_bytes) / measured - 1

    @property
    def card_share(self) -> float:
        """Predicted share of the device's memory, with the known difference."""
        return (self.device_bytes + self.row.difference_bytes) / self.card_bytes

    @property
    def false_fit(self) -> bool:
        """Whether a run that ran out of memory is predicted to fit."""
        return self.row.value == "out of memory" and self.card_share <= 1

    @property
    def false_refusal(self) -> bool:
        """Whether a run that fitted is predicted to take far more than the device has."""
        return self.row.value != "out of memory" and self.card_share > TOLERANCE


def predict(row: Measurement) -> Prediction:
    """Predicts a measured run.

    The peak is that of a training step, without building the model and saving: the measured programs do both in other
    ways, and most of them measure from the first step on.

    Raises:
        ConfigError: No configuration expresses the run; the message says why.
    """
    config = config_of(row)
    ranks = int(row.ranks)
    found = reference_estimate(config) if row.planner == "reference" else estimate(config, ranks=ranks)
    peak = _step_bytes(found)
    overhead = found.reserved_bytes - int(SLACK * (found.peak_bytes - peak)) if found.reserved_bytes else 0
    outside = outside_bytes(ranks, communicators(config.parallel)) if found.reserved_bytes else 0
    quantities = {"reserved": peak + overhead - outside, "outcome": peak + overhead}
    return Prediction(row, quantities.get(row.quantity, peak), peak + overhead, parse_device_memory(row.card))


def _step_bytes(found: Estimate) -> int:
    return max(point.total for point in found.timeline if point.phase not in ("init", "save"))


def predict_all(rows: Iterable[Measurement]) -> tuple[list[Prediction], dict[str, str]]:
    """Predicts all rows; returns (predictions, {id: reason why there is none})."""
    predictions, refused = [], {}
    for row in rows:
        try:
            predictions.append(predict(row))
        except ConfigError as error:
            refused[row.id] = str(error)
    return predictions, refused


def as_json(rows: list[Measurement]) -> dict[str, Any]:
    """Returns what `--public --json` prints."""
    predictions, refused = predict_all(rows)
    return {
        "predicted": [
            {
                **prediction.row.model_dump(),
                "measured_bytes": prediction.row.measured_bytes,
                "predicted_bytes": prediction.predicted_bytes,
                "error": prediction.error,
                "unexplained_error": prediction.unexplained_error,
                "device_bytes": prediction.device_bytes,
                "card_bytes": prediction.card_bytes,
                "card_share": prediction.card_share,
            }
            for prediction in predictions
        ],
        "not_predicted": [{"id": row, "reason": reason} for row, reason in refused.items()],
        "false_fits": [p.row.id for p in predictions if p.false_fit],
        "false_refusals": [p.row.id for p in predictions if p.false_refusal],
    }


def as_markdown(rows: list[Measurement]) -> str:
    """Returns what `--public` prints: the last sections of the report."""
    predictions, refused = predict_all(rows)
    lines = [_cells(prediction) for prediction in predictions]
    fits = ", ".join(p.row.id for p in predictions if p.false_fit) or "none"
    refusals = ", ".join(p.row.id for p in predictions if p.false_refusal) or "none"
    return "\n".join(
        [
            "## Rows\n",
            table(["row", "measured", "predicted", "error", "unexplained", "of the card", "what matters most"], lines),
            f"\nOut of memory, but predicted to fit: {fits}. Fitted, but predicted to take more than "
            f"{TOLERANCE - 1:.0%} beyond the card: {refusals}.\n",
            "## Rows that are not predicted\n",
            table(["row", "why"], [[row, reason.replace("\n", " ")] for row, reason in refused.items()]),
        ]
    )


def _cells(prediction: Prediction) -> list[str]:
    row = prediction.row
    unit = row.unit if row.unit in UNITS else "GB"
    measured = f"{row.value:g} {unit} {row.quantity}" if isinstance(row.value, float) else str(row.value)
    share = f"{prediction.device_bytes / prediction.card_bytes:.0%}"
    mark = "≥ " if row.relation == "lower bound" else ""
    return [
        row.id,
        measured,
        f"{mark}{prediction.predicted_bytes / UNITS[unit]:.2f} {unit}",
        "" if prediction.error is None else f"{prediction.error:+.1%}",
        "" if prediction.unexplained_error is None else f"{prediction.unexplained_error:+.1%}",
        share + (f" ({prediction.card_share:.0%})" if row.difference_bytes else ""),
        row.matters,
    ]
