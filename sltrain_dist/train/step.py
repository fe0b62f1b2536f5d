"""The forward and backward passes of one update, over all its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sltrain_dist.data.stream.rows import count_labels, count_tokens, split_marks
from sltrain_dist.errors import DataError
from sltrain_dist.models.loss import IGNORE
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.environment import Environment

Rows = npt.NDArray[np.int32]
"""(rows, seq_len + 1) token ids, −1 for padding. Documents' first tokens may be marked, see `rows.split_marks`."""


class Batch(NamedTuple):
    """The inputs of a model, each (rows, seq_len) int64."""

    input_ids: Tensor
    labels: Tensor
    """The next token of each input, or `loss.IGNORE`."""
    positions: Tensor | None
    """Position of each token in its document, counted from the row's start for a document that began before it. None:
    positions in the row."""


def to_batch(rows: Tensor, *, reset_attention: bool = False) -> Batch:
    """Converts :data:`Rows`, as an int32 tensor on the model's device, to the inputs of the model."""
    ids, begins = split_marks(rows)
    # Padding needs a valid id. It follows the document, so that causal attention hides it.
    inputs = ids[:, :-1].clamp(min=0)
    # A document's first token is not predicted either, because no token of the document precedes it.
    labels = ids[:, 1:].masked_fill((ids[:, 1:] < 0) | begins[:, 1:], IGNORE)
    return Batch(inputs, labels, _positions(begins[:, :-1]) if reset_attention else None)


def _positions(begins: Tensor) -> Tensor:
    """Returns the distance of each token from the last beginning of a document, or of the row."""
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
    """Runs all micro-batches of one update, and leaves the gradients in the engine.

    Args:
        engine: The engine.
        rows: This rank's rows.
        micro_batch: Number of rows per forward pass.
        env: The distributed environment.
        reset_attention: Whether the documents of a row are independent; see `data.reset_attention`.
        sent: The rows on the device, if they have been copied already.
        meanwhile: Called after all work has been submitted to the device, before waiting for its result.

    Returns:
        The mean loss over all labels of the global batch, and its number of non-padding tokens.

    Raises:
        DataError: The global batch has no labels.
    """
    labels_total, tokens_total = env.sum([float(count_labels(rows)), float(count_tokens(rows))])
    if labels_total == 0:
        raise DataError("a global batch has nothing to predict: every document in it is shorter than two tokens")
    on_device = torch.from_numpy(rows).to(env.device) if sent is None else sent
    local_loss = torch.zeros((), dtype=torch.float64, device=env.device)
    starts = range(0, len(rows), micro_batch)
    for start in starts:
        watchdog.beat("in a forward and backward pass")
        batch = to_batch(on_device[start : start + micro_batch], reset_attention=reset_attention)
        local_loss += engine.micro_step(
            batch.input_ids, batch.labels, 1.0 / labels_total, last=start == starts[-1], positions=batch.positions
        )
    meanwhile()
    (loss_total,) = env.sum([float(local_loss)])
    return loss_total / labels_total, int(tokens_total)
