"""The planner's results under the stable keys of `sltrain plan --json` (no torch). Sizes are in bytes."""

from __future__ import annotations

from typing import Any

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.result import Point
from sltrain_dist.plan.paper.accounting import paper_method, paper_table
from sltrain_dist.plan.planned_run import PlannedRun, launch_command
from sltrain_dist.plan.search.combinations import Row, SearchResult


def plan_json(planned: PlannedRun) -> dict[str, Any]:
    """Returns a planned run under stable keys, which docs/planner_search.md lists."""
    estimate, largest = planned.estimate, planned.estimate.phases()
    result: dict[str, Any] = {
        "peak_bytes": estimate.peak_bytes,
        "device_bytes": estimate.device_bytes,
        "phases": {phase: point.total for phase, point in largest.items()},
        "components": _components_json(estimate.peak),
        "fits": planned.fits,
        "margin_bytes": planned.margin_bytes,
        "parameters": estimate.parameters,
        "flops_per_token": estimate.flops_per_token,
        "comm_bytes_per_update": estimate.comm_bytes_per_update,
        "peak_phase": estimate.peak.phase,
        "where": estimate.peak.where,
        "phase_components": {phase: _components_json(point) for phase, point in largest.items()},
        "method": estimate.method,
        "relative_error": estimate.relative_error,
        "ranks": planned.ranks,
        "device_memory_bytes": planned.device_memory,
        "assumed": dict(planned.assumed),
    }
    if planned.config.reparam.restart_every:
        result |= {"restart_bytes": estimate.restart_bytes, "restart_flops": estimate.restart_flops}
    if planned.changes is not None:
        result["changes"] = [{"set": dict(change.values), **_row_json(change.row)} for change in planned.changes]
    if planned.search is not None:
        result["search"] = _search_json(planned.search, planned)
    return result


def accounting_json(config: Config) -> dict[str, Any]:
    """Returns the paper's accounting of a configuration's method, and of all methods for its model."""
    method = paper_method(config.reparam)
    methods = {
        each.method: {
            "parameter_gb": float(each.parameter_gb),
            "optimizer_gb": float(each.optimizer_gb),
            "total_gb": float(each.total_gb),
            "parameter_bytes": each.parameter_bytes,
            "optimizer_bytes": each.optimizer_bytes,
        }
        for each in paper_table(config.model, config.reparam)
    }
    return {"method": method, **methods[method], "methods": methods}


def _components_json(point: Point) -> dict[str, int]:
    return {component: num_bytes for component, num_bytes in point.components.items() if num_bytes}


def _search_json(found: SearchResult, planned: PlannedRun) -> dict[str, Any]:
    rows = [_row_json(row) for row in planned.rows]
    if planned.device_memory is not None:
        for listed, row in zip(rows, planned.rows, strict=True):
            listed["within_error"] = row.is_within_error(planned.device_memory)
    for listed, path in zip(rows, planned.saved_files, strict=False):
        listed |= {"file": path, "launch": launch_command(path, planned.ranks)}
    return {
        "examined": found.examined,
        "estimated": len(found.rows),
        "equal": found.equal,
        "refused": dict(found.refused.most_common()),
        "fitting": sum(row.fits(planned.device_memory) for row in found.rows),
        "smallest": _row_json(found.smallest),
        "rows_left_out": planned.rows_left_out,
        "rows": rows,
    }


def _row_json(row: Row) -> dict[str, Any]:
    result = {
        "settings": dict(row.settings),
        "relative_speed": row.relative_speed,
        "peak_bytes": row.peak_bytes,
        "device_bytes": row.device_bytes,
        "parameters": row.parameters,
        "flops_per_token": row.flops_per_token,
        "comm_bytes_per_update": row.comm_bytes_per_update,
        "binding": row.binding,
    }
    return result if row.replayed_bytes is None else {**result, "replayed_bytes": row.replayed_bytes}
