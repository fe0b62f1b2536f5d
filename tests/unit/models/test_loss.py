"""The chunked loss: equal to the plain one, and never tokens x vocabulary in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain_dist.config.load import build_config
from sltrain_dist.models import loss as loss_module
from sltrain_dist.models.build import build_model
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.models.loss import IGNORE, chunked_cross_entropy_sum, cross_entropy_sum

VOCABULARY, SIZE = 53, 8
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
LABELS = {"some": 3, "none": 0, "all": 1}
"""Every so-manieth label is ignored; 0: none is."""


def inputs(shape: tuple[int, ...], dtype: torch.dtype, ignored: str = "some") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*shape, SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    if every := LABELS[ignored]:
        labels.view(-1)[::every] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in float64, from the definition."""
    x, w, y = hidden.detach().double().flatten(0, -2), weight.detach().double(), labels.flatten()
    p = (x @ w.T).exp()
    p = p / p.sum(1, keepdim=True)
    counts = y != IGNORE
    loss = -p[counts, y[counts]].log().sum()
    p[counts, y[counts]] -= 1
    p[~counts] = 0
    return loss, (p @ w).view(hidden.shape), p.T @ x


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("chunk", [1, 4, 5, 15, 1000])
@pytest.mark.parametrize("ignored", list(LABELS))
def test_loss_and_gradients_are_the_definitions(dtype: torch.dtype, chunk: int, ignored: str) -> None:
    hidden, weight, labels = inputs((3, 5), dtype, ignored)
    got = chunked_cross_entropy_sum(hidden, weight, labels, chunk)
    (got * 0.37).backward()
    want = oracle(hidden, weight, labels)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for found, expected in zip((got, hidden.grad / 0.37, weight.grad / 0.37), want, strict=True):
        if ignored == "all":
            assert not found.any()
        else:
            assert relative(found, expected) < ROUNDING[dtype]
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    with torch.no_grad():
        assert relative(chunked_cross_entropy_sum(hidden, weight, labels, chunk), got.double()) < ROUNDING[dtype]


@pytest.mark.parametrize("chunk", [4, 1000])
def test_plain_loss_agrees_to_rounding(chunk: int) -> None:
    hidden, weight, labels = inputs((4, 9), torch.float32)
    ours = chunked_cross_entropy_sum(hidden, weight, labels, chunk)
    plain = cross_entropy_sum(hidden @ weight.T, labels)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_ignored_labels_that_count_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with a gradient where nothing is predicted, the comparison above fails."""
    correct = loss_module._loss_and_gradient

    def counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, gradient, counts = correct(logits, labels)
        return loss, gradient, torch.ones_like(counts)

    monkeypatch.setattr(loss_module, "_loss_and_gradient", counted)
    hidden, weight, labels = inputs((3, 5), torch.float32)
    chunked_cross_entropy_sum(hidden, weight, labels, 4).backward()
    _, of_hidden, of_weight = oracle(hidden, weight, labels)
    assert relative(hidden.grad, of_hidden) > 0.01
    assert relative(weight.grad, of_weight) > 0.01


class Anew(torch.autograd.Function):
    """The loss, computed again for every backward pass, as gradcheck makes several."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        ctx.inputs, ctx.chunk = (hidden.detach(), weight.detach(), labels), chunk
        with torch.no_grad():
            return cross_entropy_sum(hidden @ weight.T, labels)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.inputs
        with torch.enable_grad():
            leaves = hidden.requires_grad_(), weight.requires_grad_()
            loss = chunked_cross_entropy_sum(*leaves, labels, ctx.chunk)
            return (*torch.autograd.grad(loss, leaves, grad_output), None, None)


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_gradcheck(chunk: int) -> None:
    hidden, weight, labels = inputs((7,), torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: Anew.apply(h, w, labels, chunk), (hidden, weight))


def test_no_tokens() -> None:
    hidden, weight, labels = inputs((0, 5), torch.float32, "none")
    loss = chunked_cross_entropy_sum(hidden, weight, labels, 4)
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_gradients_that_are_wanted(frozen: int) -> None:
    tensors = inputs((3, 5), torch.float32)
    tensors[frozen].requires_grad_(False)
    chunked_cross_entropy_sum(*tensors, 4).backward()
    assert tensors[frozen].grad is None
    other = 1 - frozen
    assert relative(tensors[other].grad, oracle(*tensors)[1 + other]) < 1e-5


def test_sixteen_bit_chunks_are_summed_in_float32() -> None:
    """As near to float64 as one product; summed in bfloat16, 512 chunks would lose most of their bits."""
    hidden, weight, labels = inputs((512,), torch.bfloat16)
    *_, want = oracle(hidden, weight, labels)
    errors = {}
    for chunk in (1, 512):
        weight.grad = None
        chunked_cross_entropy_sum(hidden, weight, labels, chunk).backward()
        errors[chunk] = relative(weight.grad, want)
    rounded = torch.zeros_like(weight)
    for row in range(512):
        h, w = hidden[row : row + 1].detach().requires_grad_(), weight.detach().requires_grad_()
        cross_entropy_sum(h @ w.T, labels[row : row + 1]).backward()
        rounded += w.grad
    assert errors[1] < 1.5 * errors[512]
    assert relative(rounded, want) > 3 * errors[1]


def test_a_second_backward_pass_is_refused() -> None:
    loss = chunked_cross_entropy_sum(*inputs((3, 5), torch.float32), 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


@pytest.mark.parametrize("label", [-1, VOCABULARY])
def test_labels_outside_of_the_vocabulary_are_refused(label: int) -> None:
    hidden, weight, labels = inputs((5,), torch.float32, "none")
    labels[2] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        chunked_cross_entropy_sum(hidden, weight, labels, 4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, labels = inputs((3, 5), torch.float32)
    with pytest.raises(ValueError, match="chunk_tokens"):
        chunked_cross_entropy_sum(hidden, weight, labels, 0)
    for wrong in ((hidden[:2], weight, labels), (hidden, weight[:, :3], labels)):
        with pytest.raises(ValueError, match="expected"):
            chunked_cross_entropy_sum(*wrong, 4)


class Largest(TorchDispatchMode):
    """Keeps the most values of a tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def model_of(chunk: int | None, dtype: str = "fp32", tied: bool = False, vocab_size: int = 997) -> LlamaForCausalLM:
    shape = {"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2}
    return build_model(
        build_config(
            {
                "model": {**shape, "tie_head": tied},
                "reparam": {"rank": 4, "density": 0.2},
                "data": {"seq_len": 32},
                "train": {"steps": 1, "dtype": dtype, "loss_chunk_tokens": chunk},
            }
        )
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_tokens_times_vocabulary_never_exists(dtype: str, grad: bool) -> None:
    ids = torch.arange(128).view(4, 32)
    numel = {}
    for chunk in (0, 20):
        with torch.set_grad_enabled(grad), Largest() as largest:
            loss = model_of(chunk, dtype)(ids, ids)
            if grad:
                loss.backward()
        numel[chunk] = largest.numel
    assert numel == {0: 128 * 997, 20: 20 * 997}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "mixed"])
def test_models_train_alike(dtype: str, tied: bool) -> None:
    ids = torch.arange(96).view(3, 32) % 61
    labels = ids.roll(-1, 1).masked_fill(ids % 7 == 0, IGNORE)
    losses, gradients = [], []
    for chunk in (0, 20, None):
        model = model_of(chunk, dtype, tied, vocab_size=61)
        loss = model(ids, labels)
        (loss / 96).backward()
        losses.append(float(loss.detach()))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    rounding = 1e-5 if dtype == "fp32" else 2e-2
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6 if dtype == "fp32" else 1e-3)
    for ours in gradients[1:]:
        assert ours.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            assert ours[name].dtype == gradient.dtype
            assert relative(ours[name], gradient.double()) < rounding, name


def test_automatic_chunks_bound_the_bytes_of_logits() -> None:
    for preset in ("llama_60m", "llama_7b"):
        config = build_config({"preset": preset})
        tokens = config.train.chunk_tokens(config.model.vocab_size)
        assert tokens * config.model.vocab_size * 4 <= 64 << 20 < (tokens + 1) * config.model.vocab_size * 4
    huge = build_config({"preset": "llama_60m", "model": {"vocab_size": 1 << 24}})
    assert huge.train.chunk_tokens(huge.model.vocab_size) == 1


@pytest.mark.slow
def test_compiles() -> None:
    """A model that is compiled as a whole computes the loss in chunks, too."""
    ids = torch.arange(64).view(2, 32) % 61
    model = model_of(20, vocab_size=61)
    want = model(ids, ids)
    model.compile(backend="aot_eager")
    got = model(ids, ids)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want, list(model.parameters()))
    for a, b in zip(torch.autograd.grad(got, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
