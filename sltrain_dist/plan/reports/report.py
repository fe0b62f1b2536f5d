"""What the planner found, in words and under stable keys (no torch, no colours)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltrain_dist.memory.result import Point
from sltrain_dist.plan.answer import Answer, launch_line
from sltrain_dist.plan.paper.accounting import PaperMemory
from sltrain_dist.plan.reports.labels import GROUPS, PHASES, binding, group_of
from sltrain_dist.plan.search.combinations import Row, Search
from sltrain_dist.tracking.console import format_bytes, format_count

_FEW = 5
"""Single changes that are listed in words."""


def size(num_bytes: float) -> str:
    """Bytes in words, of 1e9 bytes to the GB, as the paper counts."""
    return format_bytes(num_bytes, decimal=True)


def as_json(known: Answer) -> dict[str, Any]:
    """An answer under stable keys; sizes in bytes."""
    estimate, largest = known.estimate, known.estimate.phases()
    result: dict[str, Any] = {
        "peak_bytes": estimate.peak_bytes,
        "device_bytes": estimate.device_bytes,
        "phases": {phase: point.total for phase, point in largest.items()},
        "components": _there(estimate.peak),
        "fits": known.fits,
        "margin_bytes": known.margin_bytes,
        "parameters": estimate.parameters,
        "flops_per_token": estimate.flops_per_token,
        "comm_bytes_per_update": estimate.comm_bytes_per_update,
        "peak_phase": estimate.peak.phase,
        "where": estimate.peak.where,
        "phase_components": {phase: _there(point) for phase, point in largest.items()},
        "method": estimate.method,
        "relative_error": estimate.relative_error,
        "ranks": known.ranks,
        "device_memory_bytes": known.device_memory,
        "assumed": dict(known.assumed),
    }
    if known.changes is not None:
        result["changes"] = [{"set": dict(change.values), **_row_json(change.row)} for change in known.changes]
    if known.found is not None:
        result["search"] = _search_json(known.found, known)
    return result


def _there(point: Point) -> dict[str, int]:
    return {component: num_bytes for component, num_bytes in point.components.items() if num_bytes}


def _search_json(found: Search, known: Answer) -> dict[str, Any]:
    rows = [_row_json(row) for row in known.rows]
    if known.device_memory is not None:
        for listed, row in zip(rows, known.rows, strict=True):
            listed["within_error"] = row.is_close(known.device_memory)
    for listed, path in zip(rows, known.saved, strict=False):
        listed |= {"file": path, "launch": launch_line(path, known.ranks)}
    return {
        "examined": found.examined,
        "estimated": len(found.rows),
        "equal": found.equal,
        "refused": dict(found.refused.most_common()),
        "fitting": sum(row.fits(known.device_memory) for row in found.rows),
        "smallest": _row_json(found.smallest),
        "rows_left_out": known.rows_left_out,
        "rows": rows,
    }


def _row_json(row: Row) -> dict[str, Any]:
    keys = ("relative_speed", "peak_bytes", "device_bytes", "parameters", "flops_per_token", "comm_bytes_per_update")
    return {
        "settings": dict(row.settings),
        **{key: getattr(row, key) for key in keys},
        "binding": row.binding,
        **({} if row.replayed_bytes is None else {"replayed_bytes": row.replayed_bytes}),
    }


def verdict(known: Answer) -> str | None:
    """Whether it fits, in a sentence; None where no device is named."""
    estimate, margin = known.estimate, known.margin_bytes
    if known.device_memory is None or margin is None:
        return None
    if margin < 0:
        return f"Does NOT fit: it needs {size(-margin)} more than the device's {size(known.device_memory)}."
    if margin < estimate.relative_error * estimate.peak_bytes:
        return (
            f"Fits into {size(known.device_memory)}, but the {size(margin)} to spare are less than the estimate's "
            "error: try train.dry_run=true on the device."
        )
    return f"Fits into {size(known.device_memory)}, with {size(margin)} to spare."


def facts(known: Answer) -> Iterator[str]:
    """Where the peak is and what binds; what the run computes and sends; how this was found."""
    estimate, peak = known.estimate, known.estimate.peak
    group, most = binding(estimate)
    sent = (
        f"{size(estimate.comm_bytes_per_update)} sent by each rank in an update" if known.ranks > 1 else "nothing sent"
    )
    where = f" ({peak.where})" if peak.where else ""
    within = f"; the peak is within {estimate.relative_error:.0%}" if estimate.relative_error else ""
    when = "at the start" if peak.phase == "init" else f"in the {PHASES[peak.phase]} phase"
    yield (
        f"Peak {size(estimate.peak_bytes)} {when}{where}; most of all there: "
        f"{GROUPS[group][0]}, {size(most)} ({most / estimate.peak_bytes:.0%})."
    )
    yield (
        f"{format_count(estimate.parameters)} parameters, {format_count(estimate.flops_per_token)} FLOPs a token, "
        f"{sent}. By {estimate.method}{within}."
    )
    if known.assumed:
        settings = " ".join(f"{key}={_yaml(value)}" for key, value in known.assumed.items())
        yield f"On one rank this is planned for {settings}, whatever the file says: start the run with it too."


def remedies(known: Answer) -> tuple[str, list[tuple[str, str]]]:
    """What would help where it does not fit: a sentence, and (settings, what comes of them) of single changes."""
    if known.changes is None:
        return "", []
    if not known.changes:
        return "No single change makes it fit; --search looks for combinations.", []
    changes = [
        (
            " ".join(f"{key}={_yaml(value)}" for key, value in change.values.items()),
            f"{size(change.row.device_bytes)}, {change.row.relative_speed:.2f} times as fast",
        )
        for change in known.changes[:_FEW]
    ]
    return "Single changes that make it fit, the least slowdown first:", changes


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def search_sentences(known: Answer) -> Iterator[str]:
    """How many combinations there were, and the smallest where none fits."""
    found = known.found
    if found is None:
        return
    refused = ", ".join(f"{key} {count:,}" for key, count in found.refused.most_common())
    yield (
        f"{found.examined:,} combinations: {len(found.rows):,} estimated, {found.equal:,} equal to another, "
        f"{found.refused.total():,} that cannot be run" + (f" ({refused})." if refused else ".")
    )
    if known.rows_left_out:
        yield f"{len(known.rows)} rows are listed, the fastest; {known.rows_left_out} more with --rows."
    if known.device_memory is None:
        return
    fitting = sum(row.fits(known.device_memory) for row in found.rows)
    yield f"{fitting:,} fit into {size(known.device_memory)}."
    if any(row.is_close(known.device_memory) for row in known.rows):
        yield "~ marks rows that have less to spare than the estimate's error: try them with train.dry_run=true first."
    if not fitting:
        smallest = found.smallest
        settings = ", ".join(f"{name} {value}" for name, value in smallest.settings.items())
        yield (
            f"The smallest takes {size(smallest.device_bytes)} ({settings}); most of all "
            f"{GROUPS[group_of(smallest.binding)][0]}, in the {PHASES[smallest.phase]} phase ({smallest.where})."
        )
        if smallest.is_close(known.device_memory):
            yield "What is missing is less than the estimate's error: train.dry_run=true on the device tells."


def launch_sentences(known: Answer) -> Iterator[str]:
    """How to start the configurations that were saved."""
    if not known.saved:
        return
    yield f"Start a row as its file says, the first with: {launch_line(known.saved[0], known.ranks)}"
    tokenizer = known.config.data.tokenizer
    if tokenizer != "embedded" and not Path(tokenizer).is_file():
        yield f"There is no file {tokenizer} here: add data.tokenizer=FILE."


@dataclass(frozen=True)
class SearchTable:
    """The listed rows of a search as text.

    Attributes:
        titles: Titles of the columns.
        settings: The titles among them that are settings; the other columns are figures.
        rows: Cells of each row, in the order of the titles; empty where a row has no such figure.
        shared: Sentence on the settings that are the same in all rows; empty if there are none.
    """

    titles: Sequence[str] = ()
    settings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    shared: str = ""


def search_table(known: Answer) -> SearchTable:
    """Returns the table of the rows that a search lists: their figures, and the settings in which they differ."""
    if not known.rows:
        return SearchTable()
    first = known.rows[0].settings
    names = [name for name in first if len({row.settings[name] for row in known.rows}) > 1]
    rows = [_row_cells(row, names, known.device_memory) for row in known.rows]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    shared = ", ".join(f"{name} {value}" for name, value in first.items() if name not in names)
    return SearchTable(
        titles,
        names,
        [[row.get(title, "") for title in titles] for row in rows],
        f"In all of these: {shared}." if shared else "",
    )


def _row_cells(row: Row, names: Sequence[str], device_memory: int | None) -> dict[str, str]:
    """Returns a row's cells by the title of the column."""
    spare = {}
    if device_memory is not None:
        mark = "~" if row.is_close(device_memory) else ""
        spare = {"to spare": f"{mark}{size(device_memory - row.device_bytes)}"}
    replayed = {} if row.replayed_bytes is None else {"replayed peak": size(row.replayed_bytes)}
    return {
        "speed": f"{row.relative_speed:.2f}",
        "device": size(row.device_bytes),
        **spare,
        "peak": size(row.peak_bytes),
        **replayed,
        **{name: row.settings[name] for name in names},
        "parameters": format_count(row.parameters),
        "FLOPs/token": format_count(row.flops_per_token),
        "sent/update": size(row.comm_bytes_per_update) if row.comm_bytes_per_update else "0",
    }


def accounting_json(memory: PaperMemory, table: Sequence[PaperMemory]) -> dict[str, Any]:
    """A cell of the paper's table, and all methods' for the same model."""
    return {"method": memory.method, **_cell_json(memory), "methods": {each.method: _cell_json(each) for each in table}}


def _cell_json(memory: PaperMemory) -> dict[str, Any]:
    return {
        "parameter_gb": float(memory.parameter_gb),
        "optimizer_gb": float(memory.optimizer_gb),
        "total_gb": float(memory.total_gb),
        "parameter_bytes": memory.parameter_bytes,
        "optimizer_bytes": memory.optimizer_bytes,
    }
