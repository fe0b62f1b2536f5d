"""The path `factored`: y = s·(xAᵀ)Bᵀ + xSᵀ without W, for one layer or several that share their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain_dist.numerics.device import in_turn
from sltrain_dist.numerics.int8_weight import plain
from sltrain_dist.sparse_lowrank.kept import keep
from sltrain_dist.sparse_lowrank.paths.blocks_on_gpu import (
    align_rows,
    input_gradient,
    layer_outputs,
    runs_on_gpu,
    sum_over_tokens,
    value_gradients,
)
from sltrain_dist.sparse_lowrank.supports.support import Support

Factors = tuple[Tensor, Tensor, Tensor]
"""B, A and V of one layer."""


class Factored(torch.autograd.Function):
    """Applies layers to one input. Saved for the backward pass are x and h = s·xAᵀ of all layers, side by side.

    If all layers arrange x alike and :attr:`Support.keeps_arranged`, the arranged x is saved in its place. The input
    is transposed, and arranged for the sparse products, once; it is multiplied by A of all layers in one product. With
    `blocks` on a GPU, what is saved of x is :func:`align_rows` of it.

    Called with (x, supports, scales, B, A, V of the first layer, B, A, V of the second …); returns the outputs, without
    biases, as a tuple.
    """

    # Parameters are saved as they are passed: see Materialize.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, supports: Sequence[Support], scales: Sequence[float], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        arranged = _arranged(x, supports)
        saved = x if arranged is None else arranged
        if runs_on_gpu(x, supports):
            saved = align_rows(x)
            x = saved[:, : x.shape[1]]
        outputs, h = keep(lambda: _factored_forward(x, arranged, _by_layer(parameters, x.dtype), supports, scales))
        ctx.supports, ctx.scales, ctx.arranged = supports, scales, arranged is not None
        ctx.save_for_backward(saved, h, *parameters)
        return tuple(differentiable(y) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = (wanted[0], *(any(wanted[3 + i :: 3]) for i in range(3)))
        layers = _by_layer(parameters, x.dtype)
        dx, gradients = factored_backward(x, h, grads, layers, ctx.supports, ctx.scales, needs, arranged=ctx.arranged)
        flat = [gradient for layer in gradients for gradient in layer]
        return dx, None, None, *(d if want else None for d, want in zip(flat, wanted[3:], strict=True))


def _by_layer(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Factors]:
    """Returns (B, A, V) of each layer: the values of int8 weights, other parameters as they are."""
    values = [plain(parameter, dtype) for parameter in parameters]
    return [(values[i], values[i + 1], values[i + 2]) for i in range(0, len(values), 3)]


def _factored_forward(
    x: Tensor, arranged: Tensor | None, layers: Sequence[Factors], supports: Sequence[Support], scales: Sequence[float]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the layers' outputs, (T, m), and h."""
    on_gpu = runs_on_gpu(x, supports)
    h = _project_down(x, layers, scales, on_gpu=on_gpu)
    by_layer = h.split([A.shape[0] for _, A, _ in layers], dim=1)
    if on_gpu:
        Bs, _, Vs = zip(*layers, strict=True)
        return layer_outputs(x, by_layer, Bs, Vs, supports), h
    outputs = _sparse_forward(x, arranged, layers, supports)
    for y, (B, _, _), h_i in zip(outputs, layers, by_layer, strict=True):
        y.addmm_(h_i, B.to(x.dtype).t())
    return tuple(outputs), h


def factored_backward(
    x: Tensor,
    h: Tensor | None,
    grads: Sequence[Tensor],
    layers: Sequence[Factors],
    supports: Sequence[Support],
    scales: Sequence[float],
    needs: Sequence[bool],
    *,
    arranged: bool = False,
) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
    """Computes the gradients of x, B, A and V, without anything of the size of W.

    Args:
        x: (T, n); or, if `arranged`, as the supports arrange it; or :func:`align_rows` of it.
        h: s·xAᵀ of all layers side by side, or None if the forward pass did not form it.
        grads: Gradients of each layer's output, (T, m).
        layers: B, A and V of each layer.
        supports: Support of each layer.
        scales: s of each layer.
        needs: Whether the gradients of x, B, A and V are needed.
        arranged: Whether x is arranged; only where :attr:`Support.keeps_arranged`.

    Returns:
        dx, and (dB, dA, dV) of each layer; None for what is not needed.
    """
    need_x, need_B, need_A, need_V = needs
    ranks = [A.shape[0] for _, A, _ in layers]
    dAs: list[Tensor | None] = [None] * len(layers)
    dBs: list[Tensor | None] = [None] * len(layers)
    dVs: list[Tensor | None] = [None] * len(layers)
    dx: Tensor | None = None
    aligned: list[Tensor] = []
    if on_gpu := runs_on_gpu(grads[0], supports):
        x, aligned = align_rows(x)[:, : supports[0].n], [align_rows(g) for g in grads]
        grads = [g[:, : support.m] for g, support in zip(aligned, supports, strict=True)]
        if need_V:
            dVs = value_gradients(x, aligned, supports)
    else:
        dx, dVs = _sparse_backward(x, grads, layers, supports, need_x, need_V, arranged=arranged)
    if need_x or need_A:
        q = _project_up(grads, layers, scales)
        if need_x and on_gpu:
            A, Vs = _stacked(layers, q.dtype, on_gpu=True), [V for _, _, V in layers]
            dx = input_gradient(q, A, aligned, Vs, supports)
        elif dx is not None:
            dx.addmm_(q, _stacked(layers, q.dtype))
        if need_A:
            if arranged:
                dA = supports[0].sum_over_tokens(q, x)
            else:
                dA = sum_over_tokens(q, x) if on_gpu else torch.mm(q.t(), x)
            dAs = list(dA.split(ranks))
    if need_B:
        h = _project_down(x, layers, scales, on_gpu=on_gpu) if h is None else h
        dBs = [torch.mm(g.t(), h_i) for g, h_i in zip(grads, h.split(ranks, dim=1), strict=True)]
    gradients = [
        tuple(None if d is None else d.to(parameter.dtype) for d, parameter in zip(of_layer, layer, strict=True))
        for of_layer, layer in zip(zip(dBs, dAs, dVs, strict=True), layers, strict=True)
    ]
    return dx, gradients


def _arranged(x: Tensor, supports: Sequence[Support]) -> Tensor | None:
    """Returns x as the supports arrange it, if all layers arrange it alike and it is saved; else None."""
    if not supports[0].keeps_arranged or len(_arranged_alike(supports)) > 1 or runs_on_gpu(x, supports):
        return None
    return supports[0].arrange_inputs(x)


def _sparse_forward(
    x: Tensor, arranged: Tensor | None, layers: Sequence[Factors], supports: Sequence[Support]
) -> list[Tensor]:
    """Returns xSᵀ of every layer, (T, m)."""
    outputs: list[Tensor] = []
    for indices in _arranged_alike(supports):
        products = [supports[i] for i in indices]
        weights = [product.weights(layers[i][2].to(x.dtype)) for i, product in zip(indices, products, strict=True)]
        slices = _slices(x, products[0].step(x))
        if len(slices) == 1:
            inputs = products[0].arrange_inputs(x) if arranged is None else arranged
            outputs += [p.multiply(w, inputs) for p, w in zip(products, weights, strict=True)]
            continue
        ys = [x.new_empty(x.shape[0], supports[i].m) for i in indices]
        for part in in_turn(slices):
            inputs = products[0].arrange_inputs(x[part])
            for product, w, y in zip(products, weights, ys, strict=True):
                product.multiply(w, inputs, y[part])
        outputs += ys
    return outputs


def _sparse_backward(
    x: Tensor,
    grads: Sequence[Tensor],
    layers: Sequence[Factors],
    supports: Sequence[Support],
    need_x: bool,
    need_V: bool,
    *,
    arranged: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Returns Σ gS over the layers, (T, n), and each layer's dV."""
    dx: Tensor | None = None
    dVs: list[Tensor | None] = []
    if not (need_x or need_V):
        return None, [None] * len(layers)
    for indices in _arranged_alike(supports):
        products = [supports[i] for i in indices]
        lead, numbered = products[0], list(enumerate(zip(indices, products, strict=True)))
        weights = [p.transposed_weights(layers[i][2].to(x.dtype)) if need_x else () for _, (i, p) in numbered]
        places = [p.places() if need_V else () for p in products]
        sums: list[Tensor | None] = [None] * len(indices)
        slices = [slice(None)] if arranged else _slices(x, lead.step(x))
        for part in in_turn(slices):
            inputs: Tensor | None = None
            if need_V:
                inputs = x if arranged else lead.arrange_inputs(x[part])
            total: Tensor | None = None
            for j, (i, product) in numbered:
                outputs = product.arrange_outputs(grads[i][part])
                if inputs is not None:
                    sums[j] = product.sample(places[j], outputs, inputs, sums[j])
                if need_x:
                    total = product.multiply_transposed(weights[j], outputs, total)
            if total is None:
                continue
            if indices[0] > 0 and dx is not None:
                dx[part].add_(lead.restore_inputs(total))
            elif len(slices) == 1:
                dx = lead.restore_inputs(total)
            else:
                dx = torch.empty_like(x, memory_format=torch.contiguous_format) if dx is None else dx
                lead.restore_inputs(total, dx[part])
        dVs += [None if s is None else p.sampled(s) for p, s in zip(products, sums, strict=True)]
    return dx, dVs


def _slices(x: Tensor, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, x.shape[0], step)]


def _arranged_alike(supports: Sequence[Support]) -> list[list[int]]:
    """Returns the layers' numbers, neighbours together whose supports arrange their inputs alike."""
    alike = [[0]]
    for i in range(1, len(supports)):
        if supports[i].shares_inputs(supports[i - 1]):
            alike[-1].append(i)
        else:
            alike.append([i])
    return alike


def _project_up(grads: Sequence[Tensor], layers: Sequence[Factors], scales: Sequence[float]) -> Tensor:
    """Returns q = s·gB of all layers side by side, (T, Σr)."""
    # Inductor reads the old content even if beta is 0, so it must be zeros.
    new = grads[0].new_zeros if torch.compiler.is_compiling() else grads[0].new_empty
    ranks = [A.shape[0] for _, A, _ in layers]
    q = new(grads[0].shape[0], sum(ranks))
    for columns, g, (B, _, _), scale in zip(q.split(ranks, dim=1), grads, layers, scales, strict=True):
        columns.addmm_(g, B.to(g.dtype), beta=0, alpha=scale)
    return q


def _project_down(x: Tensor, layers: Sequence[Factors], scales: Sequence[float], *, on_gpu: bool) -> Tensor:
    """Returns h = s·xAᵀ of all layers side by side, (T, Σr)."""
    A = _stacked(layers, x.dtype, on_gpu=on_gpu)
    if len(set(scales)) == 1:
        return scaled_mm(x, A.t(), scales[0])
    h = torch.mm(x, A.t())
    for columns, scale in zip(h.split([A.shape[0] for _, A, _ in layers], dim=1), scales, strict=True):
        columns.mul_(scale)
    return h


def differentiable(y: Tensor) -> Tensor:
    """Returns an output of an autograd function's forward pass, written in place, in a form that has a gradient.

    Under torch.compile, torch 2.11 silently gives no gradient to what depends on such an output, but does to what
    depends on a view of it.
    """
    return y.view_as(y) if torch.compiler.is_compiling() else y


def scaled_mm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns scale·left·right, scaled inside the product: without a pass over the result or a copy of a factor."""
    return torch.addmm(left.new_zeros(1, 1), left, right, beta=0, alpha=scale)


def _stacked(layers: Sequence[Factors], dtype: torch.dtype, *, on_gpu: bool = False) -> Tensor:
    """Returns A of all layers, one below the other; with `on_gpu` a view in rows as of :func:`align_rows`."""
    A = layers[0][1].to(dtype) if len(layers) == 1 else torch.cat([A.to(dtype) for _, A, _ in layers])
    return align_rows(A)[:, : A.shape[1]] if on_gpu else A
