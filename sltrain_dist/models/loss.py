"""The training loss: cross-entropy of logits, or of hidden states and the head in chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sltrain_dist.numerics.device import in_turn
from sltrain_dist.numerics.int8_weight import cast_weight, times, times_transposed

IGNORE = -100
"""Label of positions that do not count (padding)."""


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the summed cross-entropy in float32; the caller divides by the number of labels of the whole batch.

    It is not a mean, because the mean over a global batch is over all its non-padding tokens, and no single rank or
    micro-batch knows their number.

    Args:
        logits: (..., vocabulary).
        labels: (...), int64; :data:`IGNORE` where nothing is predicted.

    Returns:
        Scalar in nats: float32, or float64 for float64 logits.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat.to(_loss_dtype(flat.dtype))
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE, reduction="sum")


def chunked_cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """Computes `cross_entropy_sum(hidden @ weight.T, labels)` with logits of `chunk_tokens` tokens at a time.

    A chunk's gradients are computed with its logits, in the forward pass (the idea is Liger Kernel's, arXiv
    2410.10989), so that no logits are saved or recomputed. The backward pass scales these gradients in place and
    returns them; it can run only once. The loss and the gradient of the logits are computed in float32, products in the
    inputs' type or autocast's. With several chunks, the weight's gradient is summed in float32, after each chunk's
    product is rounded to the products' type, as the product of a single chunk would be.

    Args:
        hidden: (..., n).
        weight: (vocabulary, n), of the same type. An int8 weight is dequantized some rows at a time.
        labels: (...), int64; :data:`IGNORE` where nothing is predicted.
        chunk_tokens: At least 1.

    Returns:
        Scalar in nats: float32, or float64 for float64 inputs.

    Raises:
        ValueError: `chunk_tokens` is not positive, or the shapes do not match.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens} must be positive")
    if hidden.shape[:-1] != labels.shape or weight.shape[1:] != hidden.shape[-1:]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes}: expected (..., n), (vocabulary, n), (...)")
    x, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _ChunkedCrossEntropy.apply(x, weight, y, chunk_tokens, dtype)
        total = x.new_zeros((), dtype=_loss_dtype(dtype))
        cast = cast_weight(weight, dtype)
        for rows in in_turn(_chunks(len(x), chunk_tokens)):
            total += cross_entropy_sum(times_transposed(x[rows].to(dtype), cast), y[rows])
        return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, dtype: torch.dtype) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        cast = cast_weight(weight, dtype)
        total = x.new_zeros((), dtype=_loss_dtype(dtype))
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = None
        several = len(x) > chunk_tokens
        if wants_weight and (several or not len(x)):
            grad_weight = torch.zeros(weight.shape, dtype=_loss_dtype(dtype), device=x.device)
        for rows in in_turn(_chunks(len(x), chunk_tokens)):
            part = x[rows].to(dtype)
            loss, grad_logits, counts = _loss_and_gradient(times_transposed(part, cast), labels[rows])
            total += loss
            if grad_x is not None:
                grad_x[rows] = times(grad_logits, cast).mul_(counts)
            if not wants_weight:
                continue
            part = part * counts  # cheaper than masking grad_logits: n values per token, not one per word
            if grad_weight is None:
                grad_weight = grad_logits.T @ part
            elif grad_weight.dtype == dtype:
                grad_weight.addmm_(grad_logits.T, part)
            else:
                grad_weight += grad_logits.T @ part
        ctx.gradients, ctx.weight_dtype = (grad_x, grad_weight), weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss frees its gradients in the backward pass; call backward() only once")
        grad_x, grad_weight = ctx.gradients
        ctx.gradients = None
        # In place: a copy of the weight's gradient would exist while all activations do.
        grad_x = None if grad_x is None else grad_x.mul_(grad_output)
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_output).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the loss and gradient of one chunk, whose logits (tokens, vocabulary) may be overwritten.

    Returns:
        The summed loss; softmax minus one-hot labels, of the logits' type, also where nothing is predicted; and
        (tokens, 1), of the same type: 1 where something is predicted, else 0.
    """
    counts = (labels != IGNORE)[:, None]
    target = labels[:, None].where(counts, 0)
    log_p = torch.log_softmax(logits, -1, dtype=_loss_dtype(logits.dtype))
    loss = -log_p.gather(1, target).where(counts, 0).sum()
    gradient = log_p.exp_()
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    return loss, gradient.to(logits.dtype), counts.to(logits.dtype)


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, tokens, chunk_tokens)]


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
