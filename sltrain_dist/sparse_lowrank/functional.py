"""The operator y = x (s·BA + S)ᵀ as a function: checks, types, and the choice of the route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.numerics.device import device_type
from sltrain_dist.sparse_lowrank.cost import Path, Ranges, Route, route_at, route_ranges
from sltrain_dist.sparse_lowrank.devices import ROUTE_GPU, Device, find_cpu
from sltrain_dist.sparse_lowrank.kept import is_keeping
from sltrain_dist.sparse_lowrank.paths.factored import Factored
from sltrain_dist.sparse_lowrank.paths.materialize import Materialize
from sltrain_dist.sparse_lowrank.route_kernels import LayerShape
from sltrain_dist.sparse_lowrank.supports.support import Support


@dataclass(frozen=True)
class Operand:
    """One layer's arguments in a call.

    Attributes:
        B: (m, r).
        A: (r, n).
        V: Values, of shape `support.values_shape`.
        support: The positions of V.
        scale: s = alpha / r.
        bias: (m,) or None.
        path: How the layer is applied; see :func:`sl_linear`.
        row_block_bytes: Most bytes of W that `materialize` builds at a time; None for all of it at once.
    """

    B: Tensor
    A: Tensor
    V: Tensor
    support: Support
    scale: float
    bias: Tensor | None = None
    path: Path = "auto"
    row_block_bytes: int | None = None


def sl_linear(
    x: Tensor,
    B: Tensor,
    A: Tensor,
    V: Tensor,
    support: Support,
    scale: float,
    bias: Tensor | None = None,
    *,
    path: Path = "auto",
    row_block_bytes: int | None = None,
) -> Tensor:
    """Applies W = scale·BA + S to x, where S holds V at the positions of `support`.

    Saved for the backward pass are the parameters themselves, x (or x as arranged for S), and in the path factored
    scale·xAᵀ; nothing of the size of W. Under autocast, everything is cast to autocast's type, as by `F.linear`.

    Args:
        x: (..., n); any number of tokens, including none.
        B: (m, r).
        A: (r, n).
        V: Values, of shape `support.values_shape`.
        support: The positions of V.
        scale: s = alpha / r.
        bias: (m,) or None.
        path: materialize builds W, uses it and frees it (the paper's Algorithm 1). factored never forms it. auto takes
            the faster, by the cost model of :mod:`sltrain_dist.sparse_lowrank.cost`.
        row_block_bytes: Most bytes of W, or of its gradient, that `materialize` forms at a time; at least one row.
            None: all at once.

    Returns:
        (..., m), of x's type, or of autocast's.

    Raises:
        ValueError: Shapes or types do not match.
        RuntimeError: A support has no positions yet, see :attr:`Support.filled`.
    """
    return sl_linear_shared(x, [Operand(B, A, V, support, scale, bias, path, row_block_bytes)])[0]


def sl_linear_shared(x: Tensor, operands: Sequence[Operand]) -> list[Tensor]:
    """Applies several layers to one input, which is saved once and, in the path factored, arranged once.

    Under torch.compile, layers with the support `blocks` must belong to one module, by their names: whether they
    permute their input alike is not checked there.

    Args:
        x: (..., n).
        operands: The layers.

    Returns:
        The outputs, as of :func:`sl_linear`.

    Raises:
        ValueError: Shapes or types do not match.
        RuntimeError: A support has no positions yet, see :attr:`Support.filled`.
    """
    dtype = _compute_dtype(x, operands)
    for operand in operands:
        _check_shapes(x, operand)
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    routes = [_route(flat, operand, len(operands)) for operand in operands]
    factored = [i for i, route in enumerate(routes) if route.path == "factored"]
    outputs: list[Tensor | None] = [None] * len(operands)
    if factored:
        layers = [operands[i] for i in factored]
        parameters = (parameter for layer in layers for parameter in (layer.B, layer.A, layer.V))
        supports, scales = tuple(layer.support for layer in layers), tuple(layer.scale for layer in layers)
        for i, y in zip(factored, Factored.apply(flat, supports, scales, *parameters), strict=True):
            outputs[i] = y
    results: list[Tensor] = []
    for operand, route, y in zip(operands, routes, outputs, strict=True):
        if y is None:
            y = Materialize.apply(
                flat, operand.B, operand.A, operand.V, operand.support, operand.scale,
                block_rows(operand, dtype), route.dense_backward,
            )  # fmt: skip
        y = y if operand.bias is None else _plus_bias(y, operand.bias.to(dtype))
        results.append(y.view(*x.shape[:-1], y.shape[-1]))
    return results


def block_rows(operand: Operand, dtype: torch.dtype) -> int:
    """Returns the number of rows of W that a layer builds at a time."""
    if operand.row_block_bytes is None:
        return operand.support.m
    return max(1, min(operand.support.m, operand.row_block_bytes // (operand.support.n * dtype.itemsize)))


def this_device(kind: str) -> Device:
    """Returns the device by which routes are chosen here: this machine's CPU if `kind` is "cpu", else one for all GPUs.

    A CPU is told by its instruction sets, not by measurements, so that equal machines choose equal routes.
    """
    if kind == "cpu":
        return find_cpu(torch.backends.cpu.get_cpu_capability(), amx=torch.cpu._is_amx_tile_supported())
    return ROUTE_GPU


def _route(x: Tensor, operand: Operand, sharing: int) -> Route:
    support, tokens = operand.support, x.shape[0]
    if tokens == 0:
        return Route("materialize", dense_backward=True)
    shape = (support.m, support.n, operand.A.shape[0], support.nnz, support.kind, sharing)
    return route_at(tokens, _ranges(shape, x.dtype.itemsize * 8, device_type(x), operand.path))


@torch.compiler.assume_constant_result
def _ranges(shape: tuple[Any, ...], bits: int, kind: str, path: Path) -> Ranges:
    """Returns :func:`route_ranges` on this process's device; from plain values, because torch.compile runs it."""
    return route_ranges(LayerShape(*shape), bits, this_device(kind), path)


def _compute_dtype(x: Tensor, operands: Sequence[Operand]) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; it must be a floating-point tensor")
    for operand in operands:
        for name, parameter in (("B", operand.B), ("A", operand.A), ("V", operand.V), ("bias", operand.bias)):
            if parameter is not None and parameter.dtype != x.dtype:
                raise ValueError(
                    f"x is {x.dtype} but {name} is {parameter.dtype}; cast one of them, or run under torch.autocast"
                )
    return x.dtype


def _check_shapes(x: Tensor, operand: Operand) -> None:
    B, A, V, support, bias = operand.B, operand.A, operand.V, operand.support, operand.bias
    support.check_filled()
    m, n = B.shape[0], A.shape[1]
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} must have the same rank")
    if x.dim() == 0 or x.shape[-1] != n:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features = {n}")
    if (m, n) != (support.m, support.n):
        raise ValueError(f"B and A make a {m}×{n} weight, but the support is for {support.m}×{support.n}")
    if tuple(V.shape) != support.values_shape:
        raise ValueError(f"V has shape {tuple(V.shape)}; the support needs {support.values_shape}")
    if bias is not None and tuple(bias.shape) != (m,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({m},)")


def _plus_bias(y: Tensor, bias: Tensor) -> Tensor:
    # Under torch.compile, y may be a view that an autograd function returned, which must not be written to.
    return y + bias if torch.compiler.is_compiling() or is_keeping() else y.add_(bias)
