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
from sltrain_dist.files import write_error, write_whole

_LINE_CHARS = 4000
"""Longer lines are cut for training: SentencePiece drops what exceeds its `max_sentence_length`."""
_FIXED_PIECES = 256 + 3
_HELD_OUT = 0.02
"""Share of the sampled text that the report is measured on and the training does not see."""


class Tokenizer:
    """A SentencePiece model file. Can be pickled, and so sent to worker processes.

    Args:
        path: The model file (`*.model`).

    Raises:
        DataError: The file is missing, is not a SentencePiece model, or defines no end-of-sequence piece.
    """

    vocab_size: int
    """Number of pieces; ids are below it."""
    eos_id: int
    """End of sequence. Always defined."""
    bos_id: int
    """Beginning of sequence, or -1 if the model has none."""
    unk_id: int
    """Unknown text."""
    pad_id: int
    """Padding, or -1 if the model has none."""
    fingerprint: str
    """First 16 hexadecimal digits of the file's SHA-256."""

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
        """Ids of each text, as int32 arrays of shape (tokens,). No special pieces are added.

        Single-threaded: the loader's workers are the parallelism. The texts must be encodable as UTF-8 (no
        lone surrogates), which what is read from UTF-8 files always is.
        """
        rows: list[npt.NDArray[np.int32]] = self._processor.encode_as_numpy(texts, num_threads=1)
        return rows

    @cached_property
    def breaks_at_spaces(self) -> bool:
        """Whether the tokens of a text up to a space are always the first of the whole text's tokens.

        That is so if no piece continues beyond a space, and a space is known: unknown characters make one piece with
        their unknown neighbours.
        """
        pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        return "▁" in pieces and not any(re.search("[^▁]▁", piece) for piece in pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special pieces become nothing."""
        return str(self._processor.decode([int(i) for i in ids]))

    def byte_fallbacks(self, ids: npt.NDArray[np.int32]) -> int:
        """How many of the ids are pieces that stand for a single byte of an unknown character."""
        return sum(map(self._processor.is_byte, ids.tolist()))


def read_model(path: Path) -> Any:
    """The parsed ModelProto of a SentencePiece model file.

    Raises:
        DataError: As :class:`Tokenizer`.
    """
    Tokenizer(path)  # for its errors
    return sentencepiece_model_pb2.ModelProto.FromString(Path(path).read_bytes())


@dataclass(frozen=True)
class TokenizerReport:
    """What :func:`train_tokenizer` made. The rates are measured on held-out text."""

    path: Path
    vocab_size: int
    fingerprint: str
    sampled_documents: int
    """Documents that were drawn, held-out ones included."""
    sampled_bytes: int
    """Their size in UTF-8."""
    held_out_bytes: int
    bytes_per_token: float
    unknown_rate: float
    """Share of the tokens that are the unknown piece; 0 with byte fallback."""
    byte_fallback_rate: float
    """Share of the tokens that stand for one byte of a character that has no piece (and for newlines)."""


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

    As LLaMA's: text is not normalised, characters without a piece become bytes, and digits stand alone. Ids
    are padding 0, end of sequence 1, unknown 2, as T5's, and there is no beginning of sequence. The same
    texts and arguments give the same file.

    Args:
        texts: Documents. All are read; a uniform sample of them is trained on.
        output: The model file to write. Its directory is made.
        vocab_size: Number of pieces, including 3 special and 256 byte pieces.
        model_type: unigram (T5's) or bpe (LLaMA's).
        sample_bytes: Bound of the sample, in bytes of UTF-8.
        character_coverage: Share of the text's characters that are guaranteed a piece.
        seed: Seed of the sample.

    Raises:
        ConfigError: vocab_size does not suit the text.
        DataError: There are fewer than two non-empty documents, or the file cannot be written.
    """
    if vocab_size <= _FIXED_PIECES:
        raise ConfigError(f"a vocabulary of {vocab_size} is too small: {_FIXED_PIECES} pieces are bytes and special")
    sample = _sample(texts, sample_bytes, random.Random(seed))
    if len(sample) < 2:
        raise DataError(f"a tokenizer needs two documents at least, one of them to measure on; found {len(sample)}")
    held_out, training = _split(sample)
    model = _train(training, vocab_size, model_type, character_coverage)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, model)
    except OSError as error:
        raise write_error(f"cannot write the tokenizer {output}", error, DataError) from None
    return _measure(Tokenizer(output), output, sample, held_out)


def _load(model: bytes, path: Path) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        # An empty file parses as an empty message, hence the second check.
        processor.LoadFromSerializedProto(model)
        if processor.vocab_size() > 0:
            return processor
    except (RuntimeError, OSError, ValueError):  # a UnicodeDecodeError where the error message quotes the damage
        pass
    raise DataError(
        f"{path} is not a SentencePiece model ({len(model)} bytes); data.tokenizer names a file such as "
        "tokenizer.model, not a tokenizer.json or a directory"
    )


def _sample(texts: Iterable[str], bound: int, rng: random.Random) -> list[str]:
    """A uniform sample of the documents, in random order, of at most `bound` bytes (but for one document).

    Every document gets a random priority; the heap keeps those of the highest priority that fit.
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
    """Held-out documents (at least one) and training documents (at least one)."""
    budget = _HELD_OUT * sum(map(_num_bytes, sample))
    taken, count = 0, 0
    while count < len(sample) - 1 and (count == 0 or taken < budget):
        taken += _num_bytes(sample[count])
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
            num_threads=1,  # sums of floats depend on how they are split over threads
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(_training_error(str(error), vocab_size)) from None
    return writer.getvalue()


def _training_error(message: str, vocab_size: int) -> str:
    """The trainer's own messages are file names and C++ expressions; the numbers in them are useful."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"a vocabulary of {vocab_size} is too large for this text: at most {found[1]}, or give more text"
    if found := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        return f"a vocabulary of {vocab_size} is too small: the bytes and this text's characters need {found[1]}"
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
