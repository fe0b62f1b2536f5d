"""Forward and backward of one update, over all its micro-batches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sltrain_dist.errors import DataError
from sltrain_dist.models.loss import IGNORE
from sltrain_dist.parallel import watchdog
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.environment import Environment

Rows = npt.NDArray[np.int32]
"""(rows, seq_len + 1) token ids, −1 where there is none."""


def to_batch(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Turns rows into (input_ids, labels), each (rows, seq_len) int64; label t is the token after input t."""
    ids = torch.from_numpy(rows).to(device, dtype=torch.int64)
    # Padding needs some valid id; it comes after the document, so causal attention never lets it be seen.
    inputs = ids[:, :-1].clamp(min=0)
    labels = ids[:, 1:].masked_fill(ids[:, 1:] < 0, IGNORE)
    return inputs, labels


def forward_backward(engine: Engine, rows: Rows, micro_batch: int, env: Environment) -> tuple[float, int]:
    """All micro-batches of one update, with gradients left in the engine.

    Returns:
        The global batch's mean loss over its labels, and its number of non-padding tokens.
    """
    labels_here = float(np.count_nonzero(rows[:, 1:] >= 0))
    tokens_here = float(np.count_nonzero(rows[:, :-1] >= 0))
    labels_total, tokens_total = env.sum([labels_here, tokens_here])
    if labels_total == 0:
        raise DataError("a global batch holds nothing to predict: every document in it is shorter than two tokens")
    loss_here = torch.zeros((), dtype=torch.float64, device=env.device)
    starts = range(0, len(rows), micro_batch)
    for start in starts:
        watchdog.beat("in a forward and backward pass")
        input_ids, labels = to_batch(rows[start : start + micro_batch], env.device)
        loss_here += engine.micro_step(input_ids, labels, 1.0 / labels_total, last=start == starts[-1])
    (loss_total,) = env.sum([float(loss_here)])
    return loss_total / labels_total, int(tokens_total)
