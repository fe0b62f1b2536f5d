"""Evaluation of the mean loss on a fixed set of tokens, independent of batch size and number of ranks."""

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
    """The result of an evaluation."""

    loss: float
    """Mean loss over all labels, in nats."""
    tokens: int
    """Number of labels."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows, NaN if the loss is NaN."""
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
    """Evaluates all rows, distributed to the ranks in turn; every label counts exactly once.

    Ranks with fewer rows add padding, because an engine's forward pass may be a collective.

    Args:
        engine: The engine.
        rows: All rows, the same on every rank.
        micro_batch: Number of rows per forward pass.
        env: The distributed environment.
        reset_attention: Whether the documents of a row are independent; see `data.reset_attention`.
        before_batch: Called before every batch, equally often on all ranks. Its exceptions end the evaluation.
    """
    mine = rows[env.rank :: env.world_size]
    passes = -(-len(rows) // (env.world_size * micro_batch))
    filler = np.full((passes * micro_batch - len(mine), rows.shape[1]), -1, dtype=np.int32)
    mine = np.concatenate((mine, filler))
    loss = torch.zeros((), dtype=torch.float64, device=env.device)
    for start in range(0, len(mine), micro_batch):
        before_batch()
        watchdog.beat("evaluating")
        on_device = torch.from_numpy(mine[start : start + micro_batch]).to(env.device)
        loss += engine.evaluate(*to_batch(on_device, reset_attention=reset_attention))
    (total,) = env.sum([float(loss)])
    tokens = count_labels(rows)
    return EvalResult(total / tokens, tokens)
