"""What a file's name tells about it: its kind, its compression and its split."""

from __future__ import annotations

import re
from enum import Enum

MANIFEST = "manifest.json"
"""Name of the manifest in a directory made by `sltrain prepare-text`."""

MAX_DOCUMENT_BYTES = 32 << 20
"""Default of `data.max_document_bytes`."""
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_COMPRESSED = r"(\.(gz|bz2|xz|zst))?$"
_METADATA = re.compile(
    rf"({re.escape(MANIFEST)}|token_shards\.json|dataset_(info|infos|dict)\.json|state\.json|index\.json"
    r"|(generation_)?config\.json|(added_tokens|special_tokens_map|vocab|tokenizer(_config)?)\.json|cache-.*\.arrow)"
)
"""Names of metadata files of this program, `datasets`, `transformers` and `streaming`."""
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "heldout", "holdout"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Words in file names that denote a split, as on the Hub."""


class Kind(Enum):
    """Kind of a file's content, with the pattern that its name matches."""

    LINES = re.compile(r"\.(json|jsonl|ndjson)" + _COMPRESSED, re.IGNORECASE)
    """JSON, one object per line."""
    PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
    ARROW = re.compile(r"\.arrow$", re.IGNORECASE)
    """Arrow's stream or file format."""
    PLAIN_TEXT = re.compile(r"\.(txt|text|md)" + _COMPRESSED, re.IGNORECASE)
    """Text, which `sltrain prepare-text` turns into documents."""
    FOREIGN = re.compile(
        r"\.(csv|tsv|zip|tar|tgz|tar\.\w+|html?|xml|pdf|docx?|epub|pkl|npy|npz|pt|bin|safetensors)$", re.IGNORECASE
    )
    """Formats that this program cannot read."""


TABLES = frozenset({Kind.PARQUET, Kind.ARROW})
DOCUMENTS = frozenset({Kind.LINES, *TABLES})


def kind_of(name: str) -> Kind | None:
    """Returns the kind of a path or URL; None for an unknown suffix, read as JSON lines if the user names the file."""
    path = without_query(name)
    return next((kind for kind in Kind if kind.value.search(path)), None)


def codec_of(name: str) -> str | None:
    """Returns the compression of a path or URL: gzip, bz2, xz, zstd or None."""
    path = without_query(name)
    return _CODECS.get(path[path.rfind(".") :].lower()) if "." in path else None


def is_url(name: str) -> bool:
    """Returns whether a name is a URL, not a path."""
    return "://" in name


def without_query(name: str) -> str:
    """Returns a URL without its query string; a path unchanged."""
    return name.split("?", 1)[0] if is_url(name) else name


def is_metadata(name: str) -> bool:
    """Returns whether a file is hidden, or known to describe data rather than hold it."""
    base = base_name(name)
    return base.startswith(".") or _METADATA.fullmatch(base) is not None


def is_held_out(name: str) -> bool:
    """Returns whether a file's name marks it as validation or test data."""
    return is_of_split(name, "validation") or is_of_split(name, "test")


def is_of_split(name: str, split: str) -> bool:
    """Returns whether a word in a file's name denotes this split."""
    words = set(re.split(r"[^a-z]+", base_name(name).lower()))
    return bool(words & _synonyms(split))


def is_training(split: str) -> bool:
    """Returns whether this is a name of a training split."""
    return split in _SPLIT_WORDS["train"]


def base_name(name: str) -> str:
    """Returns the last component of a path or URL."""
    return without_query(name).rstrip("/").rpartition("/")[2]


def printable(name: str) -> str:
    """Returns a path with bytes that are not UTF-8 escaped; Python keeps them as surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def _synonyms(split: str) -> set[str]:
    return next((words for words in _SPLIT_WORDS.values() if split in words), {split})
