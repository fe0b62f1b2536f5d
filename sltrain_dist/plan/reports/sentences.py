"""The planner's results as sentences and as a table, for the terminal, the HTML page and the plot (no torch)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sltrain_dist.config.presets import PRESETS
from sltrain_dist.plan.components import GROUPS, PHASES, largest_group
from sltrain_dist.plan.planned_run import PlannedRun, launch_command
from sltrain_dist.tracking.console import format_bytes, format_count

_MAX_CHANGES = 5
"""Number of single changes that are listed."""


def format_size(num_bytes: float) -> str:
    """Formats bytes with a decimal unit, 1e9 bytes to the GB, as the paper counts."""
    return format_bytes(num_bytes, decimal=True)


def describe_run(planned: PlannedRun) -> str:
    """Returns one line that describes the planned run: model, method, optimizer, batch, recomputation and ranks."""
    config, ranks = planned.config, planned.ranks
    model, reparam, optim, parallel, train = config.model, config.reparam, config.optim, config.parallel, config.train
    name = f"{model.num_layers} layers of width {model.hidden_size}"
    if config.preset and all(getattr(model, key) == value for key, value in PRESETS[config.preset]["model"].items()):
        name = config.preset
    method: str = reparam.method
    if method not in ("full", "apollo-mini"):
        method += f" r={reparam.rank}"
    if method.startswith("sltrain"):
        method += f" δ={reparam.density:g} {reparam.support}"
    if reparam.dense_layers:
        method += f", dense layers {', '.join(map(str, reparam.dense_layers))}"
    where = "1 rank" if ranks == 1 else f"{ranks} ranks"
    if parallel.engine != "ddp":
        stage = f" {parallel.zero_stage}" if parallel.engine == "zero" else ""
        where += f", {parallel.engine}{stage}, shards {parallel.shard}"
    elif ranks > 1:
        where += ", ddp"
    update = ", per layer" if optim.update == "per_layer" else ""
    return (
        f"{name}, {method}; {optim.name} {optim.state_bits} bit{update}; {train.dtype}, "
        f"{train.micro_batch} × {config.data.seq_len} tokens, recompute {train.activation_checkpointing}; {where}"
    )


def fact_sentences(planned: PlannedRun) -> Iterator[str]:
    """Yields where the peak is, what the run computes and sends, and how the estimate was made."""
    estimate, peak = planned.estimate, planned.estimate.peak
    group, num_bytes = largest_group(estimate)
    sent = "nothing sent"
    if planned.ranks > 1:
        sent = f"{format_size(estimate.comm_bytes_per_update)} sent by each rank in an update"
    where = f" ({peak.where})" if peak.where else ""
    within = f"; the peak is within {estimate.relative_error:.0%}" if estimate.relative_error else ""
    when = "at the start" if peak.phase == "init" else f"in the {PHASES[peak.phase]} phase"
    yield (
        f"Peak {format_size(estimate.peak_bytes)} {when}{where}; largest part: "
        f"{GROUPS[group].name}, {format_size(num_bytes)} ({num_bytes / estimate.peak_bytes:.0%})."
    )
    yield (
        f"{format_count(estimate.parameters)} parameters, {format_count(estimate.flops_per_token)} FLOPs a token, "
        f"{sent}. By {estimate.method}{within}."
    )
    if planned.config.reparam.restart_every:
        slots = planned.config.train.global_batch * planned.config.data.seq_len
        yield (
            f"A restart takes {format_size(estimate.restart_bytes)} for one layer at a time on each rank, and "
            f"{format_count(estimate.restart_flops)} FLOPs of all ranks together, "
            f"{estimate.restart_flops / (slots * estimate.flops_per_token):.2g} of an update's."
        )
    if planned.assumed:
        settings = _overrides(planned.assumed)
        yield f"With one rank, the plan is for {settings}, whatever the file says: add it to the training command."


def verdict(planned: PlannedRun) -> tuple[Literal["good", "warn", "bad"], str]:
    """Returns whether the run fits on the device as a level and a sentence, which is empty if no device is named.

    The level is "warn" if the run fits by less than the estimate's error.
    """
    estimate, margin = planned.estimate, planned.margin_bytes
    if planned.device_memory is None or margin is None:
        return "good", ""
    device = format_size(planned.device_memory)
    if margin < 0:
        return "bad", f"Does NOT fit: it needs {format_size(-margin)} more than the device's {device}."
    if margin < estimate.relative_error * estimate.peak_bytes:
        return "warn", (
            f"Fits into {device}, but the {format_size(margin)} to spare are less than the estimate's error: "
            "try train.dry_run=true on the device."
        )
    return "good", f"Fits into {device}, with {format_size(margin)} to spare."


def suggested_changes(planned: PlannedRun) -> tuple[str, list[tuple[str, str]]]:
    """Returns a sentence on single changes that make the run fit, and for each its settings and its outcome.

    The sentence is empty if no changes were looked for.
    """
    if planned.changes is None:
        return "", []
    if not planned.changes:
        return "No single change makes it fit; --search looks for combinations.", []
    changes = []
    for change in planned.changes[:_MAX_CHANGES]:
        outcome = f"{format_size(change.row.device_bytes)}, {change.row.relative_speed:.2f} times as fast"
        changes.append((_overrides(change.values), outcome))
    return "Single changes that make it fit, the least slowdown first:", changes


def search_sentences(planned: PlannedRun) -> Iterator[str]:
    """Yields how many combinations were searched and how many fit, and the smallest if none fits."""
    found = planned.search
    if found is None:
        return
    refused = ", ".join(f"{key} {count:,}" for key, count in found.refused.most_common())
    yield (
        f"{found.examined:,} combinations: {len(found.rows):,} estimated, {found.equal:,} equal to another, "
        f"{found.refused.total():,} that cannot be run" + (f" ({refused})." if refused else ".")
    )
    if planned.rows_left_out:
        yield f"{len(planned.rows)} rows are listed, the fastest; {planned.rows_left_out} more with --rows."
    if planned.device_memory is None:
        return
    fitting = sum(row.fits(planned.device_memory) for row in found.rows)
    yield f"{fitting:,} fit into {format_size(planned.device_memory)}."
    if any(row.is_within_error(planned.device_memory) for row in planned.rows):
        yield "~ marks rows that have less to spare than the estimate's error: try them with train.dry_run=true first."
    if not fitting:
        smallest = found.smallest
        settings = ", ".join(f"{name} {value}" for name, value in smallest.settings.items())
        yield (
            f"The smallest takes {format_size(smallest.device_bytes)} ({settings}); largest part: "
            f"{GROUPS[smallest.binding].name}, in the {PHASES[smallest.peak.phase]} phase ({smallest.peak.where})."
        )
        if smallest.is_within_error(planned.device_memory):
            yield "It misses by less than the estimate's error: train.dry_run=true on the device shows whether it fits."


def search_columns(planned: PlannedRun) -> dict[str, list[str]]:
    """Returns the cells of the listed rows by the column's title: figures, and the settings in which the rows differ.

    At least one row must be listed. A cell is empty if its row has no such figure.
    """
    rows, device_memory = planned.rows, planned.device_memory
    columns = {
        "speed": [f"{row.relative_speed:.2f}" for row in rows],
        "device": [format_size(row.device_bytes) for row in rows],
    }
    if device_memory is not None:
        marks = ["~" if row.is_within_error(device_memory) else "" for row in rows]
        spare = [format_size(device_memory - row.device_bytes) for row in rows]
        columns["to spare"] = [f"{mark}{size}" for mark, size in zip(marks, spare, strict=True)]
    columns["peak"] = [format_size(row.peak_bytes) for row in rows]
    if any(row.replayed_bytes is not None for row in rows):
        replayed = [row.replayed_bytes for row in rows]
        columns["replayed peak"] = ["" if size is None else format_size(size) for size in replayed]
    for name in rows[0].settings:
        values = [row.settings[name] for row in rows]
        if len(set(values)) > 1:
            columns[name] = values
    columns["parameters"] = [format_count(row.parameters) for row in rows]
    columns["FLOPs/token"] = [format_count(row.flops_per_token) for row in rows]
    sent = [row.comm_bytes_per_update for row in rows]
    columns["sent/update"] = [format_size(num_bytes) if num_bytes else "0" for num_bytes in sent]
    return columns


def shared_settings(planned: PlannedRun) -> str:
    """Returns a sentence on the settings that are the same in all listed rows; empty if there are none."""
    settings = planned.rows[0].settings.items()
    shared = [f"{name} {value}" for name, value in settings if all(row.settings[name] == value for row in planned.rows)]
    return f"In all of these: {', '.join(shared)}." if shared else ""


def launch_sentences(planned: PlannedRun) -> Iterator[str]:
    """Yields how to start the configurations that were saved."""
    if not planned.saved_files:
        return
    command = launch_command(planned.saved_files[0], planned.ranks)
    yield f"Each file begins with the command that trains with it. For the first row: {command}"
    tokenizer = planned.config.data.tokenizer
    if tokenizer != "embedded" and not Path(tokenizer).is_file():
        yield f"There is no file {tokenizer} here: add data.tokenizer=FILE."


def _overrides(values: Mapping[str, Any]) -> str:
    """Formats values by dotted key as they are written on the command line: "section.key=value …"."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return " ".join(f"{key}={text}" for key, text in texts.items())
