"""From lines to token ids: every unusable line has its cause, every usable one its tokens."""

import gzip
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from sltrain_dist.data.documents import Fault, Tally, Text, _prefix, encode_documents, parse
from sltrain_dist.data.tokenizer import Tokenizer
from tests.support.data import NumberTokenizer


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a"}\n', "a"),
        (b'{"text": " a\\n", "url": "u"}\r\n', " a\n"),
        ('{"text": "x\u0085y\u2028z"}'.encode(), "x\u0085y\u2028z"),
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
        (b"garbage", Fault.NOT_JSON),
        (b'{"text": "cut of', Fault.NOT_JSON),
        (b"[" * 100_000, Fault.NOT_JSON),
        (b'{"text": 1' + b"0" * 5000 + b"}", Fault.NO_TEXT),
        (b'{"text": "a", "id": 1' + b"0" * 5000 + b"}", "a"),
        (b'\xef\xbb\xbf{"text": "a"}\n', "a"),
        (b"\xef\xbb\xbf\n", Fault.EMPTY),
        (Fault.TOO_LONG, Fault.TOO_LONG),
        (Text(b"\xef\xbb\xbfa"), "\ufeffa"),
        (b'{"title": "a"}', Fault.NO_TEXT),
        (b'{"text": null}', Fault.NO_TEXT),
        (b'{"text": ["a"]}', Fault.NO_TEXT),
        (b'"text"', Fault.NO_TEXT),
        (b'{"text": "\xff"}', Fault.INVALID_UTF8),
        (b'{"text": "a\\ud800b"}', Fault.INVALID_UTF8),
        (b"\n", Fault.EMPTY),
        (b'{"text": " \\t\\u00a0\\n"}', Fault.EMPTY),
    ],
)
def test_parse(line, expected):
    assert parse(line, "text") == expected


def test_encoding_keeps_the_order_and_marks_what_has_no_tokens():
    texts = ["1 2", "words without numbers", "3", None, "4 " * 1000]
    lines = [(10 * i, json.dumps({"text": text}).encode()) for i, text in enumerate(texts)] * 30
    results = list(encode_documents(lines, NumberTokenizer(), "text", None))
    assert [index for index, _ in results] == [index for index, _ in lines]
    for start in range(0, len(results), 5):
        a, b, c, d, e = (result for _, result in results[start : start + 5])
        assert (a.tolist(), b, c.tolist(), d, len(e)) == ([1, 2], Fault.EMPTY, [3], Fault.NO_TEXT, 1000)


def test_only_a_prefix_is_tokenized_where_that_is_enough():
    class Spy(NumberTokenizer):
        characters = 0

        def encode(self, texts):
            self.characters += sum(map(len, texts))
            return super().encode(texts)

    spy = Spy()
    dense, sparse = "7 " * 50_000, "x" * 50_000 + " 8" * 40
    lines = [(0, json.dumps({"text": dense}).encode()), (1, json.dumps({"text": sparse}).encode())]
    (_, first), (_, second) = encode_documents(lines, spy, "text", 64)
    assert np.array_equal(first[:64], np.full(64, 7))
    assert second.tolist() == [8] * 40
    assert spy.characters < 1.1 * len(sparse)


HARD = [
    "_" * 9000,
    "_" * 9000 + " and then words " * 3000,
    "ab_" * 3000 + " x" * 3000,
    "中文没有空格" * 3000,
    ("word" + "\u3000" + "\u200b " * 3 + "e\u0301 " + "\u00a0" * 2) * 2000,
    "     " * 4000 + "end " * 2000,
    "hello" + " " * 40 + "x",
    "\n".join(["line of text"] * 3000),
    "a" * 20_000,
    "\U0001f600\ufe0f " * 3000 + "\x00\x01 " * 100,
]


@pytest.mark.parametrize("model", ["t5-32k", "mistral-v1-32k"])
@pytest.mark.parametrize("max_tokens", [2, 64, 700])
def test_a_prefix_has_the_tokens_of_the_whole_text(shared_data, model, max_tokens):
    """For every document, also where tokens depend on what is far away."""
    tokenizer = Tokenizer(shared_data / "tokenizers" / f"{model}.model")
    with gzip.open(shared_data / "text" / "wiki-en-2018.00000.json.gz") as file:
        texts = [*HARD, *(json.loads(line)["text"] for line in itertools.islice(file, 100))]
    lines = [(number, json.dumps({"text": text}).encode()) for number, text in enumerate(texts)]
    encoded = dict(encode_documents(lines, tokenizer, "text", max_tokens))
    whole = tokenizer.encode(texts)
    assert tokenizer.breaks_at_spaces
    for number, ids in encoded.items():
        assert ids[:max_tokens].tolist() == whole[number][:max_tokens].tolist(), texts[number][:50]
        assert (len(ids) < max_tokens) == (len(whole[number]) < max_tokens)


def test_where_a_text_may_be_cut():
    """Before the first of several spaces, after what normalization does not take for one."""
    assert _prefix("ab  cd ef", 5) == "ab"
    assert _prefix("ab\u200b cd", 6) == "ab\u200b cd"
    assert _prefix("中文 ab cd", 5) == "中文"
    assert _prefix("short", 5) == "short"
    assert _prefix("  no place", 3) == "  no place"


def test_a_vocabulary_that_reaches_beyond_spaces_reads_all(shared_data, monkeypatch):
    tokenizer = Tokenizer(shared_data / "tokenizers" / "t5-32k.model")
    for pieces, expected in ((["▁", "a▁b"], False), (["a"], False), (["▁", "▁▁", "▁a"], True)):
        vocabulary = SimpleNamespace(id_to_piece=lambda ids, pieces=pieces: pieces)
        monkeypatch.setattr(tokenizer, "_processor", vocabulary)
        tokenizer.__dict__.pop("breaks_at_spaces", None)
        assert tokenizer.breaks_at_spaces == expected
    spy = NumberTokenizer()
    spy.breaks_at_spaces = False
    text = "7 " * 50_000
    ((_, ids),) = encode_documents([(0, json.dumps({"text": text}).encode())], spy, "text", 64)
    assert len(ids) == 50_000


def test_tally_names_counts_cause_and_line():
    tally = Tally()
    for line in range(100):
        tally.add("s.json", line, Fault.NOT_JSON if line in (40, 60) else Fault.EMPTY if line == 70 else "text")
    assert tally.exceeds(0.029)
    assert not tally.exceeds(0.03)
    message = str(tally.error("here", 0.029, "text"))
    assert "3 of 100 documents" in message
    assert "not_json: 2, empty: 1" in message
    assert "line 41 of s.json (not_json)" in message
    assert "prepare-text" not in message


def test_the_remedy_fits_the_cause():
    text, long = Tally(), Tally()
    for line in range(5):
        text.add("s", line, Fault.NOT_JSON)
        long.add("s", line, Fault.TOO_LONG if line else "text")
    assert "write one JSON object per line; `sltrain prepare-text` converts plain text" in str(
        text.error("here", 0, "text")
    )
    latin = Tally()
    latin.add("s", 0, Fault.INVALID_UTF8)
    assert "convert it to UTF-8, for example with `sltrain prepare-text --encoding latin-1`" in str(
        latin.error("here", 0, "text")
    )
    array = Tally()
    array.add("s", 0, Fault.NO_TEXT)
    assert "check data.text_field='body' and that each line is one JSON object" in str(array.error("here", 0, "body"))
    assert "raise data.max_document_bytes" in str(long.error("here", 0, "text"))
