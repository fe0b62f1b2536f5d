"""Small studies, and run directories as finished trials leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from sltrain_dist.study.study_file import Study, Trial, load_study


def study_values(directory: Path, **changes: Any) -> dict[str, Any]:
    """Values of a study of two arms, two learning rates and two seeds; `changes` win."""
    values: dict[str, Any] = {
        "study_dir": str(directory / "study"),
        "base": {
            "model": {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 44, "num_layers": 2, "num_heads": 4},
            "reparam": {"rank": 6, "density": 0.1},
            "data": {"seq_len": 24, "batching": "pack"},
            "train": {"micro_batch": 4, "global_batch": 8, "dtype": "fp32"},
            "eval": {"source": "embedded"},
            "tracking": {"mlflow": False},
        },
        "arms": {"full": {"reparam": {"method": "full"}}, "blocks": {"reparam.support": "blocks"}},
        "lrs": [0.01, 0.001],
        "seeds": [1, 2],
        "budgets": [3840],
    }
    return {**values, **changes}


def make_study(directory: Path, *overrides: str, **changes: Any) -> Study:
    """Writes a study's file and loads it."""
    return load_study(write_study(directory / "study.yaml", study_values(directory, **changes)), overrides)


def write_study(path: Path, values: dict[str, Any]) -> Path:
    """Writes values as a study's file, whose arms keep their order."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def finish(
    trial: Trial, loss: float, *, code: int | None = 0, tokens_per_s: float = 100.0, eval_tokens: int = 50
) -> None:
    """Writes what a trial of ten updates leaves in its run directory. The first update is slow."""
    trial.run_dir.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 5.5, "eval_perplexity": 244.7, "eval_tokens": eval_tokens}]
    for step in range(1, 11):
        line = {"step": step, "loss": 5.5 + (loss - 5.5) * step / 10, "tokens": step * trial.tokens // 10}
        line |= {"tokens_per_s": tokens_per_s if step > 1 else 1.0, "peak_memory_bytes": 10**9, "elapsed_s": 2.0 * step}
        lines.append(
            line | ({"observed_memory_bytes": 2_000_000, "predicted_memory_bytes": 2_100_000} if step > 2 else {})
        )
    lines.append({"step": 10, "eval_loss": loss, "eval_perplexity": 10 * loss, "eval_tokens": eval_tokens})
    (trial.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"code": code, "reason": "done" if code == 0 else "made up", "step": 10, "time": ""}
    (trial.run_dir / "exit.json").write_text(json.dumps(values))
