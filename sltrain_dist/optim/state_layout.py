"""What optimizers keep for a parameter (no torch): which states, and which parameters decay."""

from __future__ import annotations

from sltrain_dist.config.schema import OptimConfig

STATE_NAMES: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""Per-value optimizer states by optimizer name; each has its parameter's shape."""


def decays(name: str, optim: OptimConfig) -> bool:
    """Whether weight decay applies to a named parameter: never to norms and embeddings."""
    return optim.weight_decay > 0 and "norm" not in name and "embed_tokens" not in name
