"""The training loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""Label of positions that do not count (padding)."""


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in float32; the caller divides by the number of labels of the whole batch.

    A sum, not a mean: the mean over a global batch is over all its non-padding tokens, and no rank or
    micro-batch alone knows how many there are.

    Args:
        logits: (..., vocabulary).
        labels: (...), int64; :data:`IGNORE` where nothing is predicted.

    Returns:
        Scalar float32, in nats.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE, reduction="sum")
