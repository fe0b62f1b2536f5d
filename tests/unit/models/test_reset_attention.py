"""`data.reset_attention`: documents that share a row know nothing of each other, whatever computes the row."""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain_dist.config.schema import Config
from sltrain_dist.data.stream.rows import RowMaker, Segment
from sltrain_dist.models.build import initialise
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.parallel.checkpointing import _ATTENTION, prepare_layers
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.evaluate import evaluate
from sltrain_dist.train.step import Batch, Rows, forward_backward, to_batch
from tests.unit.models.test_model import small, tokens, warmed

SINGLE = Environment(0, 1, 0, torch.device("cpu"))
EOS = 1
SEQ_LEN = 24
LENGTHS = (9, 30, 1, 2, 13, 5, 7)
"""Of the documents: one is longer than a row, so that a row begins in its middle."""


def documents() -> list[np.ndarray]:
    """Some hold eos in their text, as its first and last token too."""
    ids = [np.random.default_rng(n).integers(2, 97, length).astype(np.int32) for n, length in enumerate(LENGTHS)]
    ids[0][4] = ids[1][0] = ids[4][-1] = EOS
    return ids


def packed(mark: bool = True) -> Rows:
    segments = (Segment(np.append(ids, EOS), [0], [len(ids) + 1]) for ids in documents())
    return RowMaker(segments, "pack", seq_len=SEQ_LEN, mark=mark).take(100)


def pieces() -> list[list[np.ndarray]]:
    """What each row, with its last label, shows of each document."""
    text = [(number, token) for number, ids in enumerate(documents()) for token in [*ids.tolist(), EOS]]
    rows = [text[start : start + SEQ_LEN + 1] for start in range(0, len(text) - 1, SEQ_LEN)]
    return [
        [np.array([token for n, token in row if n == number]) for number in dict.fromkeys(n for n, _ in row)]
        for row in rows
    ]


def batch(mark: bool = True) -> Batch:
    return to_batch(torch.from_numpy(packed(mark)), reset_attention=mark)


def logits_of_pieces(model: torch.nn.Module) -> list[Tensor]:
    """Row by row, the logits at the input tokens, every piece of a document computed by itself."""
    return [torch.cat([model(torch.from_numpy(piece)[None])[0] for piece in row])[:SEQ_LEN] for row in pieces()]


def double(config: Config) -> LlamaForCausalLM:
    return warmed(config).double()


SHAPES = {"plain": {}, "grouped": {"num_kv_heads": 2}}


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6), ("bfloat16", 2e-2)])
def test_logits_are_those_of_each_document_alone(shape: dict[str, int], dtype: str, tolerance: float) -> None:
    model = warmed(small(model=shape)).to(getattr(torch, dtype))
    model.model.rotary_emb.float()
    model.model.rotary_emb.reset_parameters()
    with torch.no_grad():
        together = model(batch().input_ids, positions=batch().positions)
        without = model(batch().input_ids)
        alone = logits_of_pieces(model)
    assert [len(row) for row in pieces()] == [2, 4, 3, 1]
    assert pieces()[1][0][0] == documents()[1][14], "no row begins in the middle of a document"
    for index, row in enumerate(alone):
        torch.testing.assert_close(together[index, : len(row)], row, rtol=0, atol=tolerance)
        first = len(pieces()[index][0])
        torch.testing.assert_close(without[index, :first], row[:first], rtol=0, atol=tolerance)
        if first < len(row):  # the control: what comes after the first border is not
            assert (without[index, first : len(row)] - row[first:]).abs().max() > 10 * tolerance


def test_loss_and_gradients_are_those_of_each_document_alone() -> None:
    """Every token but the first of each piece is predicted once: a document's first token by nothing."""
    config = small()
    row_wise, by_piece = double(config), double(config)
    loss = row_wise(*batch())
    loss.backward()
    total, labels = torch.zeros((), dtype=torch.float64), 0
    for row in pieces():
        for piece in row:
            ids = torch.from_numpy(piece)[None]
            if ids.shape[1] > 1:
                total = total + by_piece(ids[:, :-1], ids[:, 1:])
                labels += ids.shape[1] - 1
    total.backward()
    assert labels == int((batch().labels >= 0).sum())
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    for (name, got), want in zip(row_wise.named_parameters(), by_piece.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12, msg=name)
    control = float(double(config)(batch().input_ids, batch().labels).detach())
    assert abs(control - float(loss.detach())) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "selective", "checkpoint_policy": "attention"},
        {"compile": True, "activation_checkpointing": "full"},
        {"dtype": "bf16"},
        {"dtype": "mixed"},
        {"loss_chunk_tokens": 7},
    ],
    ids=str,
)
def test_training_settings_change_nothing(how: dict[str, object]) -> None:
    """Also two micro-batches, through the training step and the evaluation."""

    def trained(train: dict[str, object]) -> tuple[float, float, dict[str, Tensor]]:
        layers = 1 if "compile" in how else 3  # each is compiled on its own
        config = small(train=train, model={"num_kv_heads": 2, "num_layers": layers})
        model = warmed(config)
        # Tracing alone: `fullgraph` fails at a graph break without a compiler too.
        with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
            prepare_layers(model, config.train)
        engine = DDPEngine(model, config.optim, SINGLE)
        evaluated = evaluate(engine, packed(), 2, SINGLE, reset_attention=True)
        loss, _ = forward_backward(engine, packed(), 2, SINGLE, reset_attention=True)
        assert evaluated.loss == pytest.approx(loss, rel=1e-5 if train.get("dtype", "fp32") == "fp32" else 1e-2)
        assert evaluated.tokens == int((batch().labels >= 0).sum())
        return loss, evaluated.loss, {name: p.grad.float() for name, p in model.named_parameters()}

    low = how.get("dtype", "fp32") != "fp32"
    (loss, _, gradients), (expected, _, plain) = trained(how), trained({})
    assert loss == pytest.approx(expected, rel=1e-2 if low else 1e-6)
    for name, gradient in plain.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=(0.1 if low else 1e-5) * scale, msg=name)


class Listen(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[object] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ran.append(operation)
        return operation(*args, **(kwargs or {}))


def fused_calls(model: LlamaForCausalLM, ids: Tensor) -> int:
    """How many layers compute attention with a mask in one kernel, forward and backward, which keep no length² for
    each head."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1) % 7
    with Listen() as listen:
        model(ids, ids, positions).backward()
    return sum(operation in _ATTENTION for operation in listen.ran)


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "mixed"])
def test_the_mask_is_held_once_and_attention_stays_fused(shape: dict[str, int], dtype: str) -> None:
    config = small(model=shape, train={"dtype": dtype})
    model, ids = warmed(config), tokens(config, 5)
    held: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim == 4 and tensor.shape[-2:] == (SEQ_LEN, SEQ_LEN):
            held.add(tensor.untyped_storage().data_ptr())
            assert tensor.untyped_storage().nbytes() == 5 * SEQ_LEN**2 * (4 if dtype == "fp32" else 2)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        assert fused_calls(model, ids) == config.model.num_layers
    assert len(held) == 1, "every layer has a mask of its own"


def test_initialised_models_have_a_table_for_positions() -> None:
    model = double(small())
    initialise(model)
    cos, _ = model.model.rotary_emb(3, torch.float64, torch.tensor([[2, 0, 1]]))
    assert torch.equal(cos[0, 0], model.model.rotary_emb(3, torch.float64)[0][[2, 0, 1]])
