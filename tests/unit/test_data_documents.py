"""From lines to token ids: every unusable line has its cause, every usable one its tokens."""

import json

import numpy as np
import pytest

from sltrain_dist.data.documents import Fault, Tally, Text, encode_documents, parse
from tests.unit.data_helpers import NumberTokenizer


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
