"""Prompts and continuations as text: pieces that are never half a character, and prompts that cannot be continued."""

from __future__ import annotations

import pytest

from sltrain_dist.data.tokenizer import Tokenizer, train_tokenizer
from sltrain_dist.errors import ConfigError
from sltrain_dist.inference.text import TextStream, continuation_text, encode_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer((f"word {i} is here" for i in range(200)), path, vocab_size=280, model_type="bpe")
    return Tokenizer(path)


@pytest.mark.parametrize("text", [" is here and 7", "s", "\n\tthe 🦊 is naïve", " 漢字 ", "   spaces   "])
def test_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    start = tokenizer.encode(["the word"])[0].tolist()
    ids = tokenizer.encode(["the word" + text])[0].tolist()[len(start) :]
    stream = TextStream(tokenizer, start)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == text == continuation_text(tokenizer, start, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""
    if "🦊" in text:
        assert "🦊" in pieces and "" in pieces, "the fox is four tokens"


def test_an_incomplete_character_comes_at_the_end(tokenizer: Tokenizer) -> None:
    start, fox = (tokenizer.encode([text])[0].tolist() for text in ("word", "word🦊"))
    stream = TextStream(tokenizer, start)
    assert "".join(stream.add(token) for token in fox[len(start) : -1]) == ""
    assert set(stream.finish()) == {"\ufffd"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt 2 is '', which has no tokens"),
        ("word " * 8, "prompt 2 has .* must fit into data.seq_len = 8"),
        ("word \ud800", "prompt 2 is not valid UTF-8"),
    ],
)
def test_prompts_that_cannot_be_continued(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_prompt(text, tokenizer, 8, "prompt 2")


def test_a_prompt_may_leave_room_for_one_token(tokenizer: Tokenizer) -> None:
    prompt = encode_prompt("word " * 6, tokenizer, 1000, "prompt 1")
    assert encode_prompt(prompt.text, tokenizer, len(prompt.ids) + 1, "prompt 1") == prompt
    with pytest.raises(ConfigError, match=f"shorten it to at most {len(prompt.ids) - 1} tokens"):
        encode_prompt(prompt.text, tokenizer, len(prompt.ids), "prompt 1")
