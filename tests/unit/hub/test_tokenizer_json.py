"""The exported tokenizer gives texts the ids that they had in training. With transformers 4.57 or 5."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from sltrain_dist.data.tokenizer import Tokenizer, train_tokenizer
from sltrain_dist.hub.tokenizer_json import write_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "", " ", "  two  spaces, and more   at the end  ", "a line\n\nanother\tline\r\n", "naïve cafe\u0301",
    "日本語 テスト", "👍🏽 emoji", "ﬁ ½ ① \u00a0\u3000\u200b", "0123456789", "-----=====", "▁ a ▁", "a" * 50,
]  # fmt: skip


def exported(model: Path, directory: Path) -> Any:
    """The tokenizer as transformers loads it from an exported model."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.model").write_bytes(model.read_bytes())
    write_tokenizer(model, directory, max_length=64)
    return transformers.AutoTokenizer.from_pretrained(directory)


def train(tmp_path: Path, model_type: str) -> Path:
    path = tmp_path / f"{model_type}.model"
    words = ["walking", "park", "nobody", "miles", "other", "further", "together", "weather", "rather", "station", "on"]
    texts = [f"The {words[i % 11]} and the {words[i * 5 % 9]} were {i} in all; {words[i % 7]}ness." for i in range(300)]
    train_tokenizer(texts, path, vocab_size=310, model_type=model_type)
    return path


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_our_own_tokenizers(model_type: str, tmp_path: Path) -> None:
    model = train(tmp_path, model_type)
    ours, theirs = Tokenizer(model), exported(model, tmp_path / "hf")
    texts = [*TEXTS, "nobody was walking 77 miles in the park"]
    ids = [row.tolist() for row in ours.encode(texts)]
    assert theirs(texts)["input_ids"] == ids
    assert [theirs.decode(row) for row in ids] == [ours.decode(row) for row in ids]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (None, 1, 2, 0)
    assert len(theirs) == ours.vocab_size == 310
    batch = theirs(["in", "in the park"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}  # a LLaMA takes no other
    assert batch["input_ids"][0][0] == 0
    assert batch["attention_mask"][0][0] == 0
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(texts)["input_ids"] == ids


@pytest.mark.parametrize(
    ("name", "special"), [("t5-32k", (None, 1, 2, 0)), ("mistral-v1-32k", (1, 2, 0, 0))], ids=["T5", "Mistral"]
)
def test_published_tokenizers_on_real_documents(
    name: str, special: tuple[int | None, ...], shared_data: Path, tmp_path: Path
) -> None:
    model = shared_data / "tokenizers" / f"{name}.model"
    theirs = exported(model, tmp_path / "hf")
    with gzip.open(shared_data / "c4/c4-validation.00000.json.gz", "rt", encoding="utf-8") as lines:
        texts = [*TEXTS, *(json.loads(line)["text"] for line in lines)]
    ids = [row.tolist() for row in Tokenizer(model).encode(texts)]
    assert len(texts) > 150
    assert theirs(texts)["input_ids"] == ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == special


def test_what_cannot_be_expressed_is_said(tmp_path: Path) -> None:
    prefix = tmp_path / "words"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "two three four"] * 9), model_prefix=str(prefix), vocab_size=7,
        model_type="word", minloglevel=3,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"no tokenizer\.json: .* neither of type unigram nor bpe"):
        ids = write_tokenizer(prefix.with_suffix(".model"), tmp_path, max_length=64)
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert not list(tmp_path.glob("*.json"))
