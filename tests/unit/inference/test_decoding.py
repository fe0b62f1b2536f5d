"""Continuations: those of Hugging Face, whatever the form of the layers and whoever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sltrain_dist.checkpoint.reader import open_newest
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import CheckpointError
from sltrain_dist.hub.export import export_dense
from sltrain_dist.inference.decoding import Limits, continue_prompts
from sltrain_dist.inference.load_model import Form, load_model
from sltrain_dist.inference.sampling import Sampling
from sltrain_dist.models.build import build_model
from sltrain_dist.models.llama import LlamaForCausalLM
from tests.unit.hub.test_export import saved
from tests.unit.models.test_model import small, warmed

PROMPTS = [[5, 9, 2, 40, 7, 7, 61], [3], [88, 12, 30]]
GREEDY = Sampling()


def lively(config: Config) -> LlamaForCausalLM:
    """A model whose next token depends on all earlier ones, and is not the same again and again."""
    model = warmed(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 40 if "embed" in name else 4)
    return model


def limits(config: Config, new: int = 12, **other: int) -> Limits:
    values = {"context": config.data.seq_len, "vocab_size": config.model.vocab_size, "eos_id": -1}
    return Limits(new, **(values | other))


def recomputed(model: LlamaForCausalLM, prompt: list[int], new: int) -> list[int]:
    """A greedy continuation without a cache: every token reads everything before it again."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"num_kv_heads": 2}},
        {"reparam": {"support": "blocks"}, "model": {"tie_head": True}},
        {"reparam": {"method": "lowrank", "dense_layers": [1]}},
        {"reparam": {"method": "full"}},
    ],
    ids=["grouped", "blocks, tied", "lowrank, a dense layer", "full"],
)
def test_greedy_continuations_are_hugging_faces(tmp_path: Path, sections: dict[str, dict[str, object]]) -> None:
    transformers = pytest.importorskip("transformers")
    _, checkpoint = saved(tmp_path, lively, **sections)
    export_dense(checkpoint, tmp_path / "hf", dtype="fp32")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    greedy = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    theirs = [reference.generate(torch.tensor([p]), **greedy)[0, len(p) :].tolist() for p in PROMPTS]
    assert min(len(set(each)) for each in theirs) >= 3, "they are not one token again and again"
    reader = open_newest(tmp_path / "run")
    forms: list[Form] = ["factored", "merged"]
    for form in forms:
        model = load_model(reader, form)
        assert continue_prompts(model, PROMPTS, limits(reader.config()), GREEDY).ids == theirs, form


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.5, 0.9, seed=4)], ids=["greedy", "sampled"])
def test_other_prompts_of_the_batch_change_nothing(sampling: Sampling) -> None:
    config = small(model={"num_kv_heads": 2})
    model = lively(config)
    together = continue_prompts(model, PROMPTS, limits(config, 20), sampling)
    for number, prompt in enumerate(PROMPTS):
        alone = continue_prompts(model, [prompt], limits(config, 20), sampling, numbers=[number])
        assert together.ids[number] == alone.ids[0]
        if sampling is GREEDY:
            assert alone.ids[0] == recomputed(model, prompt, len(alone.ids[0]))
    # The longest prompt has filled the context of 24 tokens, and the others have gone on without it.
    assert [len(ids) for ids in together.ids] == [17, 20, 20]
    assert together.stops == ["context", "max_new_tokens", "max_new_tokens"]


def test_it_ends_where_the_model_says_so_and_stays_within_the_vocabulary() -> None:
    config = small()
    model = lively(config)
    whole = continue_prompts(model, PROMPTS, limits(config), GREEDY).ids
    end = whole[1][4]
    ended = continue_prompts(model, PROMPTS, limits(config, eos_id=end), GREEDY)
    assert ended.ids[1] == whole[1][: whole[1].index(end)] and ended.stops[1] == "end of sequence"
    for row, ids in enumerate(whole):
        assert ended.ids[row] == (ids[: ids.index(end)] if end in ids else ids)
    assert max(map(max, whole)) >= 50
    few = continue_prompts(model, PROMPTS, limits(config, vocab_size=50), GREEDY).ids
    assert max(map(max, few)) < 50


def test_tokens_are_announced_in_order() -> None:
    config = small()
    heard: list[tuple[int, int]] = []
    grown = continue_prompts(
        lively(config), PROMPTS, limits(config, 3), GREEDY, token_added=lambda *each: heard.append(each)
    )
    assert heard == [(row, grown.ids[row][step]) for step in range(3) for row in range(3)]


@pytest.mark.parametrize(
    ("train", "reparam"),
    [("fp32", {"weight_bits": 8}), ("bf16", {}), ("mixed", {})],
    ids=["int8", "bf16", "mixed"],
)
def test_weights_of_every_precision(tmp_path: Path, train: str, reparam: dict[str, object]) -> None:
    optim = {"name": "adamw" if reparam else "sgd"}
    trained, checkpoint = saved(tmp_path, build_model, train={"dtype": train}, reparam=reparam, optim=optim)
    reader = open_newest(checkpoint)
    model = load_model(reader, "factored")
    kind = torch.bfloat16 if train == "bf16" else torch.float32
    assert {p.dtype for p in model.parameters()} == {kind} and not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).float(), trained(ids).float(), rtol=0, atol=0.1 if train != "fp32" else 1e-5
        )
        merged = load_model(reader, "merged", dtype=torch.float32)
        exact = load_model(reader, "factored", dtype=torch.float32)
        torch.testing.assert_close(merged(ids), exact(ids), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in merged.parameters()) > 1.5 * sum(p.numel() for p in exact.parameters())


def test_other_supports_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = saved(tmp_path)
    reader = open_newest(checkpoint)
    monkeypatch.setitem(reader.state, "supports", "0" * 16)
    with pytest.raises(CheckpointError, match="other supports"):
        load_model(reader, "merged")
