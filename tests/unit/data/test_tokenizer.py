from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from sltrain_dist.data.tokenizer import Tokenizer, TokenizerReport, _sample, train_tokenizer
from sltrain_dist.errors import ConfigError, DataError
from tests.support.paths import REPO

T5 = REPO.parent / "shared/data/tokenizers/t5-32k.model"


def _texts(count: int = 200, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrst", k=rng.randint(2, 8))) for _ in range(150)]
    return [" ".join(rng.choices(words, k=40)) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TokenizerReport]:
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "tiny.model"
    report = train_tokenizer(_texts(), path, vocab_size=400)
    return Tokenizer(path), report


def test_special_ids_and_report(trained: tuple[Tokenizer, TokenizerReport]) -> None:
    tokenizer, report = trained
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2, -1)
    assert tokenizer.vocab_size == report.vocab_size == 400
    assert tokenizer.fingerprint == report.fingerprint and len(report.fingerprint) == 16
    assert report.sampled_documents == 200
    assert report.sampled_bytes == sum(len(text) for text in _texts())
    assert 0 < report.held_out_bytes < 0.1 * report.sampled_bytes
    assert report.bytes_per_token > 1.5
    assert report.unknown_rate == report.byte_fallback_rate == 0
    assert [p.name for p in report.path.parent.iterdir()] == ["tiny.model"]


@pytest.mark.parametrize(
    "text",
    ["abc def.", "  two  spaces ", "line\nline\r\n\ttab", "naïve ½ ﬁ ‘x’ 漢字", "🙂👩‍👩‍👧", "nul\0l", "123 4567"],
)
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_round_trip_is_lossless(tmp_path: Path, model_type: str, text: str) -> None:
    path = tmp_path / "m.model"
    train_tokenizer(_texts(40), path, vocab_size=300, model_type=model_type)  # type: ignore[arg-type]
    tokenizer = Tokenizer(path)
    (ids,) = tokenizer.encode([text])
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == text


def test_encode_adds_nothing_and_is_int32(trained: tuple[Tokenizer, TokenizerReport]) -> None:
    tokenizer, _ = trained
    rows = tokenizer.encode([_texts()[0], "", "🙂"])
    assert [row.dtype for row in rows] == [np.dtype(np.int32)] * 3
    assert rows[1].shape == (0,)
    assert all(tokenizer.eos_id not in row and row.max() < 400 for row in (rows[0], rows[2]))
    assert tokenizer.byte_fallbacks(rows[2]) == 4
    assert tokenizer.byte_fallbacks(rows[0]) == 0
    assert tokenizer.encode([]) == []


def test_can_be_sent_to_workers(trained: tuple[Tokenizer, TokenizerReport]) -> None:
    tokenizer, _ = trained
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(copy.encode(["abc def"])[0], tokenizer.encode(["abc def"])[0])


def test_training_is_deterministic_and_seeded(tmp_path: Path) -> None:
    models = []
    for number, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{number}.model"
        report = train_tokenizer(_texts(), path, vocab_size=300, sample_bytes=20_000, seed=seed)
        assert 15_000 < report.sampled_bytes <= 20_000
        models.append(path.read_bytes())
    assert models[0] == models[1] != models[2]


def test_sample_is_bounded_and_uniform() -> None:
    texts = [f"{number:03d}" + "x" * 97 for number in range(1000)]
    counts = np.zeros(1000)
    for seed in range(60):
        sample = _sample(texts, 30_000, random.Random(seed))
        assert len(sample) == 300
        counts[[int(text[:3]) for text in sample]] += 1
    # 60 draws of 0.3: 18 ± 3.5 each; halves of 500 documents: 9000 ± 79 · √0.7 at most.
    assert abs(counts[:500].sum() - 9000) < 400
    assert counts.min() > 2 and counts.max() < 36


def test_models_that_are_damaged(tmp_path: Path) -> None:
    """Cut, and with flipped bits: SentencePiece quotes some of them in messages that are not UTF-8."""
    path = tmp_path / "good.model"
    train_tokenizer((f"word {i} is here" for i in range(200)), path, vocab_size=280, model_type="bpe")
    content, refused = path.read_bytes(), 0
    for place in range(0, len(content), 29):
        flipped = bytearray(content)
        flipped[place] ^= 0x80
        for damaged in (flipped, content[:place]):
            (tmp_path / "bad.model").write_bytes(damaged)
            try:
                Tokenizer(tmp_path / "bad.model").encode(["word 7 is here"])
            except DataError:
                refused += 1
    assert refused > len(content) / 29


@pytest.mark.parametrize("content", [b"", b"not a model at all, but text\n" * 20, b'{"version": "1.0"}'])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(DataError, match=r"cannot read the tokenizer .* data\.tokenizer"):
            Tokenizer(path)


def test_truncated_model(trained: tuple[Tokenizer, TokenizerReport], tmp_path: Path) -> None:
    path = tmp_path / "cut.model"
    path.write_bytes(trained[1].path.read_bytes()[:1000])
    with pytest.raises(DataError):
        Tokenizer(path)


def test_model_without_eos(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_texts(40)),
        model_prefix=str(tmp_path / "no_eos"),
        vocab_size=100,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    with pytest.raises(DataError, match="no end-of-sequence"):
        Tokenizer(tmp_path / "no_eos.model")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize(("size", "message"), [(200, "too small"), (270, "too small"), (50_000, "too large")])
def test_unsuitable_vocabulary(tmp_path: Path, model_type: str, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"a vocabulary of {size} is {message}"):
        train_tokenizer(_texts(40), tmp_path / "m.model", vocab_size=size, model_type=model_type)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["only one document"], ["one", "", " \n "]])
def test_too_few_documents(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="two documents"):
        train_tokenizer(texts, tmp_path / "m.model", vocab_size=300)


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the tokenizer"):
        train_tokenizer(_texts(40), tmp_path / "file" / "m.model", vocab_size=300)


@pytest.mark.skipif(not T5.is_file(), reason="T5's tokenizer is not here")
def test_t5() -> None:
    tokenizer = Tokenizer(T5)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (32_000, 0, 1, -1)
    assert tokenizer.decode(tokenizer.encode(["Sparse plus low-rank."])[0]) == "Sparse plus low-rank."
