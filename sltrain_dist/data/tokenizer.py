"""SentencePiece tokenizers: reading a model file, and training a new one."""

from __future__ import annotations

import hashlib
import heapq
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from sltrain_dist.errors import ConfigError, DataError
from sltrain_dist.files import failing_as, write_whole

_LINE_CHARS = 4000
"""Longer lines are split for training: SentencePiece drops lines beyond its `max_sentence_length`."""
_FIXED_PIECES = 256 + 3
_HELD_OUT = 0.02
"""Share of the sampled text that is kept out of training, to measure the report on."""


class Tokenizer:
    """A SentencePiece tokenizer. Can be pickled, and so sent to worker processes.

    Args:
        path: The model file (`*.model`).

    Raises:
        DataError: The file is missing, is not a SentencePiece model, or defines no end-of-sequence piece.
    """

    vocab_size: int
    """Number of pieces; ids are 0 … vocab_size − 1."""
    eos_id: int
    """Id of the end-of-sequence piece. Always defined."""
    bos_id: int
    """Id of the beginning-of-sequence piece, or -1 if the model has none."""
    unk_id: int
    """Id of the piece for unknown text."""
    pad_id: int
    """Id of the padding piece, or -1 if the model has none."""
    fingerprint: str
    """First 16 hexadecimal digits of the model file's SHA-256."""

    def __init__(self, path: Path) -> None:
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {path}: {error.strerror or error}; set data.tokenizer to a SentencePiece "
                "model file, or make one with `sltrain train-tokenizer`"
            ) from None
        self._processor = _load(model, path)
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        self.bos_id = self._processor.bos_id()
        self.unk_id = self._processor.unk_id()
        self.pad_id = self._processor.pad_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        if self.eos_id < 0:
            raise DataError(
                f"the tokenizer {path} has no end-of-sequence piece, which separates documents; choose another, or "
                "make one with `sltrain train-tokenizer`"
            )

    def encode(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Returns the ids of each text, as int32 arrays of shape (tokens,). No special pieces are added.

        Single-threaded: the loader's workers are the parallelism. The texts must be encodable as UTF-8 (no
        lone surrogates); text read from UTF-8 files always is.
        """
        rows: list[npt.NDArray[np.int32]] = self._processor.encode_as_numpy(texts, num_threads=1)
        return rows

    @cached_property
    def breaks_at_spaces(self) -> bool:
        """Whether cutting a text before a space always gives a prefix of the whole text's tokens.

        True if no piece continues beyond a space and the vocabulary has the space: adjacent unknown characters merge
        into one piece.
        """
        pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        return "▁" in pieces and not any(re.search("[^▁]▁", piece) for piece in pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, without special pieces."""
        return str(self._processor.decode([int(i) for i in ids]))

    def byte_fallbacks(self, ids: npt.NDArray[np.int32]) -> int:
        """Counts the ids that stand for a single byte of an unknown character."""
        return sum(map(self._processor.is_byte, ids.tolist()))


def read_model(path: Path) -> Any:
    """Returns the parsed ModelProto of a SentencePiece model file.

    Raises:
        DataError: As in :class:`Tokenizer`.
    """
    Tokenizer(path)  # raises DataError
    return sentencepiece_model_pb2.ModelProto.FromString(Path(path).read_bytes())


@dataclass(frozen=True)
class TokenizerReport:
    """Result of :func:`train_tokenizer`. The rates are measured on held-out text."""

    path: Path
    vocab_size: int
    fingerprint: str
    sampled_documents: int
    """Number of sampled documents, held-out ones included."""
    sampled_bytes: int
    """Size of the sampled documents in UTF-8."""
    held_out_bytes: int
    bytes_per_token: float
    unknown_rate: float
    """Share of the tokens that are the unknown piece; 0 with byte fallback."""
    byte_fallback_rate: float
    """Share of the tokens that stand for one byte of a character without a piece (or for a newline)."""


def train_tokenizer(
    texts: Iterable[str],
    output: Path,
    *,
    vocab_size: int,
    model_type: Literal["unigram", "bpe"] = "unigram",
    sample_bytes: int = 20_000_000,
    character_coverage: float = 0.9995,
    seed: int = 0,
) -> TokenizerReport:
    """Trains a lossless SentencePiece model and writes it atomically.

    As in LLaMA, text is not normalised, characters without a piece become bytes, and every digit is a piece. As in
    T5, padding is id 0, end of sequence 1, unknown 2, and there is no beginning of sequence. The same texts and
    arguments give the same file.

    Args:
        texts: Documents. All are read; training uses a uniform sample of them.
        output: The model file to write. Missing directories are made.
        vocab_size: Number of pieces, including 3 special and 256 byte pieces.
        model_type: unigram (as in T5) or bpe (as in LLaMA).
        sample_bytes: Largest size of the sample, in bytes of UTF-8.
        character_coverage: Share of the text's characters that are guaranteed a piece.
        seed: Seed of the sampling.

    Raises:
        ConfigError: vocab_size is too small or too large for the text.
        DataError: There are fewer than two non-empty documents, or the file cannot be written.
    """
    if vocab_size <= _FIXED_PIECES:
        raise ConfigError(f"a vocabulary of {vocab_size} is too small: byte and special pieces take {_FIXED_PIECES}")
    sample = _sample(texts, sample_bytes, random.Random(seed))
    if len(sample) < 2:
        raise DataError(f"a tokenizer needs at least two documents, one of them to measure on; found {len(sample)}")
    held_out, training = _split(sample)
    model = _train(training, vocab_size, model_type, character_coverage)
    with failing_as(f"cannot write the tokenizer {output}", DataError):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, model)
    return _measure(Tokenizer(output), output, sample, held_out)


def _load(model: bytes, path: Path) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        # An empty file parses as an empty message, hence the check of the size.
        processor.LoadFromSerializedProto(model)
        if processor.vocab_size() > 0:
            return processor
    except (RuntimeError, OSError, ValueError):  # a UnicodeDecodeError if the error message quotes binary data
        pass
    raise DataError(
        f"{path} is not a SentencePiece model ({len(model)} bytes); set data.tokenizer to a file such as "
        "tokenizer.model, not to a tokenizer.json or a directory"
    )


def _sample(texts: Iterable[str], bound: int, rng: random.Random) -> list[str]:
    """Returns a uniform sample of the documents in random order: at most `bound` bytes, but at least two.

    Every document gets a random priority; the heap keeps the documents of the highest priority that fit.
    """
    heap: list[tuple[float, int, str]] = []
    size = 0
    for index, text in enumerate(texts):
        if not text.strip():
            continue
        heapq.heappush(heap, (rng.random(), index, text))
        size += _num_bytes(text)
        while size > bound and len(heap) > 2:
            size -= _num_bytes(heapq.heappop(heap)[2])
    return [text for _, _, text in sorted(heap)]


def _split(sample: list[str]) -> tuple[list[str], list[str]]:
    """Splits the sample into held-out and training documents, at least one each."""
    budget = _HELD_OUT * sum(map(_num_bytes, sample))
    size, count = 0, 0
    while count < len(sample) - 1 and (count == 0 or size < budget):
        size += _num_bytes(sample[count])
        count += 1
    return sample[:count], sample[count:]


def _lines(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LINE_CHARS):
                yield line[start : start + _LINE_CHARS]


def _train(texts: list[str], vocab_size: int, model_type: str, character_coverage: float) -> bytes:
    writer = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=writer,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            max_sentence_length=4 * _LINE_CHARS,  # in bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,  # floating-point sums depend on how they are split over threads
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(_training_error(str(error), vocab_size)) from None
    return writer.getvalue()


def _training_error(message: str, vocab_size: int) -> str:
    """Turns a message of the trainer, full of file names and C++ expressions, into one about the vocabulary."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"a vocabulary of {vocab_size} is too large for this text: use at most {found[1]}, or more text"
    if found := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        return f"a vocabulary of {vocab_size} is too small: the bytes and this text's characters need {found[1]} pieces"
    return f"SentencePiece cannot train a vocabulary of {vocab_size} on this text: {message}"


def _measure(tokenizer: Tokenizer, path: Path, sample: list[str], held_out: list[str]) -> TokenizerReport:
    ids = np.concatenate(tokenizer.encode(held_out))
    held_out_bytes = sum(map(_num_bytes, held_out))
    return TokenizerReport(
        path=path,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        sampled_documents=len(sample),
        sampled_bytes=sum(map(_num_bytes, sample)),
        held_out_bytes=held_out_bytes,
        bytes_per_token=held_out_bytes / len(ids),
        unknown_rate=float(np.mean(ids == tokenizer.unk_id)),
        byte_fallback_rate=tokenizer.byte_fallbacks(ids) / len(ids),
    )


def _num_bytes(text: str) -> int:
    return len(text.encode())
