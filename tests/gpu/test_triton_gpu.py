"""The Triton kernels on a GPU: what holds in the interpreter, at larger shapes too, and gradcheck by differences."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sltrain_dist.numerics import gpu_kernels
from sltrain_dist.sparse_lowrank import SLLinear
from tests.support import triton_cases
from tests.support.triton_adam_cases import *  # noqa: F403
from tests.support.triton_cases import *  # noqa: F403
from tests.support.triton_cases import made

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_layer_follow_differences(dtype: torch.dtype) -> None:
    """Along a direction, the loss changes as the gradients say: differences in float64, gradients by the kernels."""
    assert triton_cases.DEVICE == "cuda"
    layer = SLLinear(512, 384, 32, 0.05, 48, support="blocks", path="factored", name="a.q", seed=0, device="cuda")
    layer.B.data = made(384, 32, dtype=torch.float32, seed=1)
    layer = layer.to(dtype)
    x, g = made(1000, 512, dtype=dtype, seed=2).requires_grad_(), made(1000, 384, dtype=dtype, seed=3)
    assert gpu_kernels.use_kernels(x)
    layer(x).backward(g)
    leaves = [x, *layer.parameters()]
    names = [None, *(name for name, _ in layer.named_parameters())]
    to = {"device": "cuda", "dtype": torch.float64}
    reference = SLLinear(512, 384, 32, 0.05, 48, support="blocks", name="a.q", seed=0, **to)

    def loss(moved: int, step: torch.Tensor) -> torch.Tensor:
        values = [leaf.detach().double() for leaf in leaves]
        values[moved] = values[moved] + step
        with torch.no_grad():
            for name, value in zip(names[1:], values[1:], strict=True):
                reference.get_parameter(name).copy_(value)
            return (reference(values[0]) * g.double()).sum()

    for i, leaf in enumerate(leaves):
        # Along the gradient itself the change is large against rounding, and it is linear in each leaf.
        step = leaf.grad.double()
        step = step / step.norm()
        change = (loss(i, step) - loss(i, -step)) / 2
        torch.testing.assert_close(change, (leaf.grad.double() * step).sum(), rtol=2e-2, atol=0.0)
