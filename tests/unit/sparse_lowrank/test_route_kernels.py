"""The lists of kernels of the cost model against traces of the layer itself: products, FLOPs, bytes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.memory.operators import FLOPS
from sltrain_dist.numerics.device import emulate, repetitions
from sltrain_dist.sparse_lowrank import SLLinear, functional
from sltrain_dist.sparse_lowrank.cost import ROUTES
from sltrain_dist.sparse_lowrank.devices import CPUS, GPUS, Device
from sltrain_dist.sparse_lowrank.layer import LowRankLinear, apply_shared
from sltrain_dist.sparse_lowrank.route_kernels import (
    ROUTE_KERNELS,
    TRITON_LAUNCHES,
    LayerShape,
    RouteKernels,
    dense_kernels,
    low_rank_kernels,
)

TOKENS = 2048
KINDS: tuple[SupportKind, ...] = ("random", "stratified", "blocks")
BYTES_TOLERANCE = 0.03
"""The lists leave out passes over single rows, and padding."""
LAUNCHES_TOLERANCE = {"rel": 0.05, "abs": 3}
"""The lists count a few fills and casts too many or too few."""

aten, sltrain_ops = torch.ops.aten, torch.ops.sltrain
NO_KERNEL = {
    aten.empty, aten.new_empty, aten.empty_like, aten.detach, aten.alias, aten.view, aten._unsafe_view,
    aten.t, aten.transpose, aten.slice, aten.select, aten.expand, aten.split, aten.split_with_sizes,
    aten.unsqueeze, aten.squeeze, aten.permute, aten.as_strided, aten.unflatten, aten.unfold,
}  # fmt: skip
"""Operators that allocate or make views."""
BAGS, DOTS = aten._embedding_bag_forward_only, aten._embedding_bag_per_sample_weights_backward
TRITON = {
    sltrain_ops.transpose, sltrain_ops.restore_inputs, sltrain_ops.blocks_outputs, sltrain_ops.blocks_inputs,
    sltrain_ops.blocks_values, sltrain_ops.stratified_add_, sltrain_ops.stratified_take,
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Counts the matrix products, their FLOPs, and the bytes that operators read and write."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.products = self.flops = self.bytes = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in NO_KERNEL or func.is_view or func.namespace == "prim":
            return out
        flops, times = FLOPS.get(packet), repetitions()
        if flops is not None:
            self.products += times
            self.flops += times * flops(*args, **(kwargs or {}), out_val=out)
        self.launches += times * (TRITON_LAUNCHES if packet in TRITON else 1)
        self.bytes += times * self.moved(packet, args, kwargs or {}, out)
        return out

    def moved(self, packet: Any, args: Any, kwargs: dict[str, Any], out: Any) -> float:
        sector = self.device.sector_bytes
        inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if packet is aten.index_add_ and args[0].dim() == 1:
            return args[2].nbytes + args[3].nbytes + 2 * sector * args[2].numel()
        if packet is aten.index_add_:  # what is added to is read and written
            return 3 * args[3].nbytes
        if packet is aten.index_select and args[0].dim() == 1 and args[0].numel() > args[2].numel():
            return args[2].nbytes + outputs[0].nbytes + sector * args[2].numel()
        if packet in (aten.index_select, aten.gather):
            return 2 * outputs[0].nbytes  # reads in order
        if packet is sltrain_ops.stratified_add_:
            return args[1].nbytes + 2 * sector * args[1].numel()
        if packet is sltrain_ops.stratified_take:
            return outputs[0].nbytes + sector * outputs[0].numel()
        if packet is aten.sort:
            return 24 * args[0].numel() * math.log2(args[0].numel())
        if packet is aten.searchsorted:
            return 0
        if packet in (BAGS, aten._embedding_bag):
            return args[1].numel() * args[0].shape[1] * args[0].element_size() + outputs[0].nbytes
        if packet is DOTS:
            return 2 * args[2].numel() * args[0].shape[1] * args[0].element_size()
        if kwargs.get("beta", 1) == 0:
            inputs = inputs[1:]
        if packet in (aten.new_zeros, aten.zeros_like, aten.bmm, aten.copy_):  # what they write to is not read
            inputs = [] if "zeros" in str(packet) else inputs[1:] if packet is aten.copy_ else inputs
        return sum(t.numel() * t.element_size() for t in (*inputs, *outputs))


def trace(
    kind: SupportKind, route: int, m: int, n: int, r: int, tokens: int, dtype: torch.dtype, device: Device,
    monkeypatch: pytest.MonkeyPatch, sharing: int = 1,
) -> tuple[Trace, LayerShape]:  # fmt: skip
    monkeypatch.setattr(functional, "route_at", lambda *args: ROUTES[route])
    with FakeTensorMode(), nullcontext() if device.is_cpu else emulate("cuda"):
        layers = [
            SLLinear(n, m, r, 0.03, 1.5, support=kind, name=f"a.{i}", seed=0, dtype=dtype, device="cpu")
            for i in range(sharing)
        ]
        for layer in layers:
            if kind == "blocks":
                layer.support._set_runs(0)  # a shift cuts one run in two
        x, g = torch.empty(tokens, n, dtype=dtype, requires_grad=True), torch.empty(tokens, m, dtype=dtype)
        with Trace(device) as traced:
            torch.autograd.backward(apply_shared(layers, x), sharing * [g])
    return traced, LayerShape(m, n, r, layers[0].support.nnz, kind, sharing)


@pytest.mark.parametrize("device", [CPUS["AMX"], GPUS["H100"]], ids=["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("route", range(3), ids=["dense", "mixed", "factored"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "sharing"),
    [((2048, 2048, 512), 3), ((5461, 2048, 512), 1), ((2048, 5461, 512), 1), ((768, 2048, 256), 2)],
    ids=str,
)
def test_lists_are_what_runs(
    kind: SupportKind, route: int, shape: tuple[int, int, int], sharing: int, dtype: torch.dtype, device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Layers of 1B and 130M: q, k and v together, gate and up of 130M, others by themselves."""
    traced, layer = trace(kind, route, *shape, TOKENS, dtype, device, monkeypatch, sharing)
    kernels = ROUTE_KERNELS[route](RouteKernels(layer, TOKENS, 8 * dtype.itemsize, device))
    products = [kernel for kernel in kernels if kernel.flops]
    assert sum(kernel.flops for kernel in products) == traced.flops
    in_triton = ("blocks", "fused") if kind == "blocks" and not device.is_cpu else ()
    counts = [TRITON_LAUNCHES if kernel.unit in in_triton else 1 for kernel in products]
    assert sum(kernel.launches // each for kernel, each in zip(products, counts, strict=True)) == traced.products
    assert sum(kernel.bytes for kernel in kernels) == pytest.approx(traced.bytes, rel=BYTES_TOLERANCE)
    assert sum(kernel.launches for kernel in kernels) == pytest.approx(traced.launches, **LAUNCHES_TOLERANCE)


@pytest.mark.parametrize("method", ["full", "lowrank"])
def test_lists_of_the_baselines(method: str) -> None:
    m, n, r = 5461, 2048, 512
    device = GPUS["H100"]
    with FakeTensorMode():
        layer = nn.Linear(n, m, bias=False) if method == "full" else LowRankLinear(n, m, r, 1.0)
        x, g = torch.empty(TOKENS, n, requires_grad=True), torch.empty(TOKENS, m)
        with Trace(device) as traced:
            layer(x).backward(g)
    listed = dense_kernels(m, n, TOKENS, 32, device)
    if method == "lowrank":
        listed = low_rank_kernels(m, n, r, TOKENS, 32, device)
    assert sum(kernel.flops for kernel in listed) == traced.flops
    assert sum(kernel.bytes for kernel in listed) == pytest.approx(traced.bytes, rel=BYTES_TOLERANCE)
    assert sum(kernel.launches for kernel in listed) == traced.launches
