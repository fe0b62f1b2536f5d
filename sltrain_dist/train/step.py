"""Forward and backward of one update, over all its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sltrain_dist.data.stream.rows import BEGIN, count_labels, count_tokens
from sltrain_dist.errors import DataError
from sltrain_dist.models.loss import IGNORE
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.environment import Environment

Rows = npt.NDArray[np.int32]
"""(rows, seq_len + 1) token ids, −1 where there is none; documents' first tokens may carry `batching.BEGIN`."""


class Batch(NamedTuple):
    """What a model reads, each (rows, seq_len) int64."""

    input_ids: Tensor
    labels: Tensor
    """The token after each input, or `loss.IGNORE`."""
    positions: Tensor | None
    """Of each token in its document, or in its row where that begins within the document. None: a row is one."""


def to_batch(rows: Tensor, *, reset_attention: bool = False) -> Batch:
    """What a model reads of :data:`Rows` that are on its device, as int32."""
    ids = rows.to(torch.int64)
    begins = ids >= BEGIN
    ids = torch.where(begins, ids - BEGIN, ids)
    # Padding needs some valid id; it comes after the document, so causal attention never lets it be seen.
    inputs = ids[:, :-1].clamp(min=0)
    # Nor is a document's first token predicted: nothing of the document comes before it.
    labels = ids[:, 1:].masked_fill((ids[:, 1:] < 0) | begins[:, 1:], IGNORE)
    return Batch(inputs, labels, _positions(begins[:, :-1]) if reset_attention else None)


def _positions(begins: Tensor) -> Tensor:
    """Distance from the last beginning, or from the row's."""
    index = torch.arange(begins.shape[1], device=begins.device)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def forward_backward(
    engine: Engine,
    rows: Rows,
    micro_batch: int,
    env: Environment,
    *,
    reset_attention: bool = False,
    sent: Tensor | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """All micro-batches of one update, with gradients left in the engine.

    Args:
        engine: The engine.
        rows: This rank's rows.
        micro_batch: Rows of a forward pass.
        env: This process among all.
        reset_attention: Whether the documents of a row are told apart.
        sent: The rows on the device, if they are there already.
        meanwhile: Called when all work is given to the device and before its result is waited for.

    Returns:
        The global batch's mean loss over its labels, and its number of non-padding tokens.
    """
    labels_total, tokens_total = env.sum([float(count_labels(rows)), float(count_tokens(rows))])
    if labels_total == 0:
        raise DataError("a global batch holds nothing to predict: every document in it is shorter than two tokens")
    there = torch.from_numpy(rows).to(env.device) if sent is None else sent
    loss_here = torch.zeros((), dtype=torch.float64, device=env.device)
    starts = range(0, len(rows), micro_batch)
    for start in starts:
        watchdog.beat("in a forward and backward pass")
        batch = to_batch(there[start : start + micro_batch], reset_attention=reset_attention)
        loss_here += engine.micro_step(
            batch.input_ids, batch.labels, 1.0 / labels_total, last=start == starts[-1], positions=batch.positions
        )
    meanwhile()
    (loss_total,) = env.sum([float(loss_here)])
    return loss_total / labels_total, int(tokens_total)
