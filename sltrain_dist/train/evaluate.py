"""Evaluation: mean loss over a fixed set of tokens, the same for any batch size and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sltrain_dist.data.stream.rows import count_labels
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.step import Rows, to_batch


@dataclass(frozen=True)
class EvalResult:
    """Attributes: mean loss over all labels (nats), and their number."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that does not fit, NaN where the loss is."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


def evaluate(
    engine: Engine,
    rows: Rows,
    micro_batch: int,
    env: Environment,
    *,
    reset_attention: bool = False,
    before_batch: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Evaluates all rows, dealt to the ranks in turn; every label counts exactly once.

    Ranks that have fewer rows fill up with padding, because an engine's forward pass may be a collective.

    Args:
        engine: The engine.
        rows: All rows, the same on every rank.
        micro_batch: Rows of a forward pass.
        env: This process among all.
        reset_attention: Whether the documents of a row are told apart.
        before_batch: Called before every batch, on all ranks equally often. What it raises ends the evaluation.
    """
    mine = rows[env.rank :: env.world_size]
    passes = -(-len(rows) // (env.world_size * micro_batch))
    filler = np.full((passes * micro_batch - len(mine), rows.shape[1]), -1, dtype=np.int32)
    mine = np.concatenate((mine, filler))
    loss = torch.zeros((), dtype=torch.float64, device=env.device)
    for start in range(0, len(mine), micro_batch):
        before_batch()
        watchdog.beat("evaluating")
        there = torch.from_numpy(mine[start : start + micro_batch]).to(env.device)
        loss += engine.evaluate(*to_batch(there, reset_attention=reset_attention))
    (total,) = env.sum([float(loss)])
    tokens = count_labels(rows)
    return EvalResult(total / tokens, tokens)
