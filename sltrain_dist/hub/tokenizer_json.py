"""Conversion of SentencePiece models to tokenizer.json and tokenizer_config.json, which transformers reads.

Without these files transformers converts `tokenizer.model` on loading by the rules of LLaMA's tokenizer: it takes the
first three pieces for LLaMA's special ones, and every normalisation for LLaMA's.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram

from sltrain_dist.data.tokenizer import read_model

_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"


def write_tokenizer(model_file: Path, directory: Path, *, max_length: int) -> dict[str, int | None]:
    """Writes tokenizer.json and tokenizer_config.json for a SentencePiece model.

    Texts get the same ids as from the SentencePiece model, as in training, and no special tokens before or after.
    There are rare exceptions. If two ways to split a word score the same except for float32 rounding, `tokenizers`,
    which adds in float64, may choose the other: once in a million tokens of unigram models. If a model normalises, as
    T5's does, `tokenizers` loses combining marks that do not compose with the character before. A text that spells a
    special token, such as </s>, becomes that token, as in all tokenizers of transformers; in unigram models, so does
    a text that spells a byte piece, such as <0x0A>.

    A model without a padding piece pads with the unknown piece: fine-tuning masks padding, and would mask the end of
    sequence if that were used.

    If the format cannot express the model, no files are written and a warning is given.

    Args:
        model_file: The SentencePiece model.
        directory: Directory to write to.
        max_length: Longest sequence that the model takes, in tokens.

    Returns:
        Values for the model's configuration: bos_token_id, eos_token_id and pad_token_id; None if there is no such id.

    Raises:
        DataError: The model file cannot be read.
    """
    model = read_model(model_file)
    spec = model.trainer_spec
    ids = {
        "bos": spec.bos_id,
        "eos": spec.eos_id,
        "unk": spec.unk_id,
        "pad": spec.pad_id if spec.pad_id >= 0 else spec.unk_id,
    }
    try:
        text = convert(model).to_str(pretty=True)
    except ValueError as error:
        warnings.warn(f"no tokenizer.json: {error}; transformers cannot read {model_file.name}", stacklevel=2)
    else:
        config = _tokenizer_config(model, ids) | {"model_max_length": max_length}
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
        settings = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return {f"{name}_token_id": ids[name] if ids[name] >= 0 else None for name in ("bos", "eos", "pad")}


def _tokenizer_config(model: Any, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": model.pieces[number].piece if number >= 0 else None for name, number in ids.items()},
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
    }


def convert(model: Any) -> Tokenizer:
    """Returns the tokenizer that gives the same ids as a SentencePiece model (its parsed ModelProto).

    Raises:
        ValueError: `tokenizers` cannot express this model.
    """
    spec, normal = model.trainer_spec, model.normalizer_spec
    if spec.model_type not in (_UNIGRAM, _BPE):
        raise ValueError("the SentencePiece model is neither of type unigram nor bpe")
    if spec.treat_whitespace_as_suffix or not normal.escape_whitespaces:
        raise ValueError("the tokenizer does not mark the spaces before words")
    tokenizer = Tokenizer(_unigram(model) if spec.model_type == _UNIGRAM else _bpe(model))
    tokenizer.normalizer = _normalizer(normal)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normal.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [p.piece for i, p in enumerate(model.pieces) if p.type == _CONTROL or i == spec.unk_id]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    user_defined = [AddedToken(p.piece, normalized=False) for p in model.pieces if p.type == _USER_DEFINED]
    tokenizer.add_tokens(user_defined)
    return tokenizer


def _unigram(model: Any) -> Unigram:
    spec = model.trainer_spec
    return Unigram([(p.piece, p.score) for p in model.pieces], spec.unk_id, spec.byte_fallback)


def _bpe(model: Any) -> BPE:
    """Returns the BPE model. Pairs are ranked by the score of the piece they form, as SentencePiece merges them."""
    spec = model.trainer_spec
    ids = {p.piece: i for i, p in enumerate(model.pieces)}
    normal = [(i, p.piece) for i, p in enumerate(model.pieces) if p.type == _NORMAL]
    normal.sort(key=lambda item: -model.pieces[item[0]].score)
    merges = [
        (piece[:cut], piece[cut:])
        for _, piece in normal
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    unknown = model.pieces[spec.unk_id].piece
    return BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
