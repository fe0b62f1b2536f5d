"""The paper's models with the paper's hyperparameters (arXiv 2406.02214, section 5.1 and appendix)."""

from __future__ import annotations

from typing import Any


def _preset(
    shape: tuple[int, int, int, int],
    rank: int,
    density: float,
    alpha: float,
    lr: float,
    steps: int,
    warmup: int,
    clip: float = 0.0,
) -> dict[str, Any]:
    hidden, intermediate, layers, heads = shape
    return {
        "model": {
            "vocab_size": 32_000,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_layers": layers,
            "num_heads": heads,
        },
        "reparam": {"method": "sltrain", "rank": rank, "density": density, "alpha": alpha, "support": "random"},
        "data": {"seq_len": 256, "batching": "pad", "truncate": "eos"},
        "optim": {
            "name": "adamw",
            "lr": lr,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip": clip,
            "schedule": "cosine",
            "warmup_steps": warmup,
            "min_lr_ratio": 0.1,
        },
        "train": {"steps": steps, "global_batch": 512, "dtype": "bf16"},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama_60m": _preset((512, 1376, 8, 8), 128, 0.03, 32.0, 3e-3, 11_000, 1_100),
    "llama_130m": _preset((768, 2048, 12, 12), 256, 0.03, 16.0, 3e-3, 22_000, 2_200),
    "llama_350m": _preset((1024, 2736, 24, 16), 256, 0.03, 16.0, 3e-3, 65_000, 6_500),
    "llama_1b": _preset((2048, 5461, 24, 32), 512, 0.03, 8.0, 3e-3, 140_000, 10_000),
    "llama_7b": _preset((4096, 11_008, 32, 32), 1024, 0.05, 8.0, 5e-4, 150_000, 15_000, clip=1.0),
}
"""Values of each preset, nested as in a configuration file."""
