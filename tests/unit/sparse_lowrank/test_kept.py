"""What selective checkpointing keeps of linear layers: the outputs, nothing of the size of W, used once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sltrain_dist.sparse_lowrank import SLLinear
from sltrain_dist.sparse_lowrank.kept import KeptResults, is_keeping, keep
from tests.support.products import Products

MM = torch.ops.aten.mm.default
T, N, M, RANK = 7, 24, 40, 4


def again(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result, kept as `train.checkpoint_policy=ops` keeps it."""
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: KeptResults.pair({MM}))


def layer(bias: bool = False, **how: Any) -> SLLinear:
    made = SLLinear(N, M, RANK, 0.2, 8.0, bias=bias, name="layer", seed=3, **how)
    with torch.no_grad():
        made.B.copy_(torch.linspace(-1, 1, made.B.numel()).view_as(made.B))
        if made.bias is not None:
            made.bias.copy_(torch.linspace(-1, 1, M))
    return made


def inputs() -> Tensor:
    return torch.linspace(-2, 3, T * N).sin().view(T, N).requires_grad_()


@pytest.mark.parametrize("path", ["materialize", "factored"])
@pytest.mark.parametrize("support", ["random", "stratified", "blocks"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_not_computed_again(path: Any, support: Any, bias: bool) -> None:
    """Its gradients are the same to the bit, also those of what depends on its output."""

    def gradients(call: Callable[..., Any]) -> tuple[list[Tensor], int]:
        first, last = layer(bias, support=support, path=path), layer(bias, support=support, path=path)
        x = inputs()
        with Products() as products:
            call(lambda x: last(first(x).sin()[:, :N]).exp(), x).sum().backward()
        return [x.grad, *(p.grad for of in (first, last) for p in of.parameters())], products.calls

    # What comes last here is read by its backward pass, unlike a decoder layer's: so that it is not the last result.
    plain, calls = gradients(lambda function, x: torch.mm(function(x), torch.eye(M)))
    kept, calls_kept = gradients(lambda function, x: again(lambda x: torch.mm(function(x), torch.eye(M)), x))
    assert calls_kept == calls
    for want, got in zip(plain, kept, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("how", [{"path": "materialize"}, {"path": "factored"}], ids=str)
def test_nothing_of_the_size_of_w_is_kept(how: dict[str, Any]) -> None:
    first, second = KeptResults.pair({MM})
    with first:
        layer(**how)(inputs())
        layer(**how)(inputs())
    assert first._results is second._results
    shapes = [
        [tuple(kept.tensor.shape) for kept in torch.utils._pytree.tree_leaves(result) if kept is not None]
        for _, result in first._results
    ]
    h = [(T, RANK)] if how["path"] == "factored" else []
    assert shapes == [[(T, M), *h]] * 2


def test_the_last_outputs_take_no_memory() -> None:
    """A decoder layer ends with a sum, which reads none of its terms again; a read gives NaN and no wrong number."""
    first, second = KeptResults.pair(())
    x = inputs()
    with first:
        y = layer(path="factored")(x)
    with second:
        z = layer(path="factored")(x)
    assert not second._results
    assert z.shape == y.shape and z.untyped_storage().nbytes() == y.element_size()
    assert z.isnan().all() and y.isfinite().all()


def test_only_the_given_operators_are_kept() -> None:
    w = torch.eye(N)
    for operators, repeated in (({MM}, 0), ((), 1)):
        with Products() as products:
            checkpoint(
                lambda x: torch.mm(torch.mm(x, w).sin(), w),
                inputs(),
                use_reentrant=False,
                context_fn=lambda operators=operators: KeptResults.pair(operators),
            ).sum().backward()
        assert products.calls == 2 + repeated + 2  # forward, the first one again, and backward by x


def test_a_result_that_is_written_to_is_refused() -> None:
    def written(x: Tensor) -> Tensor:
        y = torch.mm(x, torch.eye(N))
        return torch.mm(y.mul_(2).sin(), torch.eye(N)).sin()

    with pytest.raises(RuntimeError, match="written to"):
        again(written, inputs()).sum().backward()


def test_passes_that_differ_are_refused() -> None:
    calls = []

    def changing(x: Tensor) -> Tensor:
        calls.append(None)
        y = torch.mm(x, torch.eye(N)) if len(calls) == 1 else layer()(x)[:, :N]
        return torch.mm(y.sin(), torch.eye(N)).sin()

    with pytest.raises(RuntimeError, match="must not differ"):
        again(changing, inputs()).sum().backward()


def test_a_second_backward_pass_is_refused() -> None:
    loss = again(lambda x: torch.mm(torch.mm(x, torch.eye(N)).sin(), torch.eye(N)), inputs()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_the_backward_pass_may_run_in_another_thread() -> None:
    """As autograd's does on a GPU."""
    gradients = []
    for call in (lambda function, x: function(x), again):
        made, x = layer(path="factored"), inputs()
        loss = call(lambda x, made=made: torch.mm(made(x).sin(), torch.eye(M)), x).sum()
        with Products() as products, ThreadPoolExecutor(1) as thread:
            thread.submit(loss.backward).result()
        assert products.calls == 0  # the mode is of this thread, and so is nothing of the backward pass
        gradients.append([x.grad, made.B.grad, made.A.grad, made.V.grad])
    for want, got in zip(*gradients, strict=True):
        assert torch.equal(got, want)


def test_outside_of_checkpoints_nothing_is_kept() -> None:
    assert not is_keeping()
    y = torch.ones(2, 3)
    outputs, saved = keep(lambda: ((y,), None))
    assert outputs[0] is y and saved is None
    with KeptResults.pair(())[0]:
        assert is_keeping()
        with KeptResults.pair(())[0]:
            assert is_keeping()
        assert is_keeping()
    assert not is_keeping()
