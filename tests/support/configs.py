"""Small models that several tests train, or plan."""

from __future__ import annotations

from typing import Any

TRAINED: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_layers": 2,
    "num_heads": 4,
}
"""The section `model` where engines and updates are compared by their numbers."""

PLANNED: dict[str, Any] = {
    "model": {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_layers": 2, "num_heads": 2},
    "reparam": {"rank": 8, "density": 0.1},
    "data": {"seq_len": 16},
    "train": {"steps": 1, "micro_batch": 2, "global_batch": 2, "dtype": "bf16"},
}
"""A configuration where bytes are compared."""
