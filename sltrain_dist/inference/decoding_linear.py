"""A sparse plus low-rank layer that is applied to a few tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sltrain_dist.sparse_lowrank.layer import SLLinear
from sltrain_dist.sparse_lowrank.paths.blocks_on_gpu import layer_outputs, runs_on_gpu
from sltrain_dist.sparse_lowrank.paths.factored import scaled_mm

_FEW_TOKENS = 64
"""Up to this number of tokens, reading the weights takes most of the time of a layer."""


class DecodingLinear(nn.Module):
    """A layer whose weights do not change: what a product with S needs of its positions is computed once, and kept.

    In training it is computed anew in every pass, because keeping it takes memory; for a single token that would be
    most of the work. It takes 4 bytes per value of S for the supports random and stratified, and nothing for blocks.
    Many tokens, as of prompts, are left to the layer itself, which may build W for them. There are no gradients.

    Args:
        layer: The layer, without a bias, on its device and in its type. Its parameters must not change any more.

    Attributes:
        layer: The layer.
    """

    def __init__(self, layer: SLLinear) -> None:
        super().__init__()
        assert layer.bias is None
        self.layer = layer
        with torch.no_grad():
            weights = layer.support.weights(layer.V.detach())
        self._count = len(weights)
        for index, weight in enumerate(weights):
            self.register_buffer(f"weights_{index}", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        flat = x.reshape(-1, x.shape[-1])
        if not 0 < len(flat) <= _FEW_TOKENS:
            return self.layer(x)
        layer, support = self.layer, self.layer.support
        h = scaled_mm(flat, layer.A.t(), layer.scale)
        if runs_on_gpu(flat, [support]):
            (y,) = layer_outputs(flat, [h], [layer.B], [layer.V], [support])
        else:
            weights = tuple(self.get_buffer(f"weights_{index}") for index in range(self._count))
            y = support.multiply(weights, support.arrange_inputs(flat)).addmm_(h, layer.B.t())
        return y.view(*x.shape[:-1], y.shape[-1])
