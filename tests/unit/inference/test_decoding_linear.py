"""Layers for decoding compute what the layers of training compute, and keep no more than they say."""

from __future__ import annotations

import pytest
import torch

from sltrain_dist.inference.decoding_linear import DecodingLinear
from sltrain_dist.inference.load_model import in_form
from sltrain_dist.sparse_lowrank import SLLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", ["random", "stratified", "blocks"])
def test_few_and_many_tokens(support: str, dtype: torch.dtype) -> None:
    layer = SLLinear(48, 40, 6, 0.2, 12.0, support=support, name="a", seed=1)
    torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(2))
    layer = layer.to(dtype).requires_grad_(False)
    ready = in_form(layer, "factored")
    assert isinstance(ready, DecodingLinear)
    kept = sum(b.nbytes for b in ready.buffers(recurse=False) if b.data_ptr() != layer.V.data_ptr())
    assert kept == (0 if support == "blocks" else 4 * layer.support.nnz + 4 * 40)
    weight = layer.dense_weight().double()
    for shape in ((1, 1), (3, 1), (64,), (65,), (2, 0), (7, 11)):
        x = torch.randn(*shape, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
        y = ready(x)
        assert y.shape == (*shape, 40) and y.dtype == dtype
        exact = x.double() @ weight.t()
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)
