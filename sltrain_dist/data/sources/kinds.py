"""What a file is, as far as its name tells: its kind, its compression, and the split that it belongs to."""

from __future__ import annotations

import re
from enum import Enum

MANIFEST = "manifest.json"
"""Name of the manifest in a directory of text that `sltrain prepare-text` has made."""

MAX_DOCUMENT_BYTES = 32 << 20
"""Default of `data.max_document_bytes`."""
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_COMPRESSED = r"(\.(gz|bz2|xz|zst))?$"
_METADATA = re.compile(
    rf"({re.escape(MANIFEST)}|token_shards\.json|dataset_(info|infos|dict)\.json|state\.json|index\.json"
    r"|(generation_)?config\.json|(added_tokens|special_tokens_map|vocab|tokenizer(_config)?)\.json|cache-.*\.arrow)"
)
"""Files that are not documents, of this program, `datasets`, `transformers` and `streaming`."""
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "heldout", "holdout"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Words in file names that name a split, as on the Hub."""


class Kind(Enum):
    """What a file holds."""

    LINES = re.compile(r"\.(json|jsonl|ndjson)" + _COMPRESSED, re.IGNORECASE)
    """JSON, one object a line."""
    PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
    ARROW = re.compile(r"\.arrow$", re.IGNORECASE)
    """Arrow's stream or file format."""
    PLAIN_TEXT = re.compile(r"\.(txt|text|md)" + _COMPRESSED, re.IGNORECASE)
    """Text that `sltrain prepare-text` makes documents of."""
    FOREIGN = re.compile(
        r"\.(csv|tsv|zip|tar|tgz|tar\.\w+|html?|xml|pdf|docx?|epub|pkl|npy|npz|pt|bin|safetensors)$", re.IGNORECASE
    )
    """Formats that nothing here reads."""


TABLES = frozenset({Kind.PARQUET, Kind.ARROW})
DOCUMENTS = frozenset({Kind.LINES, *TABLES})


def kind_of(name: str) -> Kind | None:
    """The kind of a path or URL; None if its suffix is of none, which is read as JSON lines where a user names it."""
    path = without_query(name)
    return next((kind for kind in Kind if kind.value.search(path)), None)


def codec_of(name: str) -> str | None:
    """The compression of a path or URL: gzip, bz2, xz or zstd."""
    path = without_query(name)
    return _CODECS.get(path[path.rfind(".") :].lower()) if "." in path else None


def is_url(name: str) -> bool:
    """Whether this is a URL and not a path."""
    return "://" in name


def without_query(name: str) -> str:
    """A URL without what follows its first question mark; a path as it is."""
    return name.split("?", 1)[0] if is_url(name) else name


def is_metadata(name: str) -> bool:
    """Whether a file is hidden, or known to describe data instead of being data."""
    base = base_name(name)
    return base.startswith(".") or _METADATA.fullmatch(base) is not None


def is_held_out(name: str) -> bool:
    """Whether a file's name says that it is validation or test data."""
    return is_of_split(name, "validation") or is_of_split(name, "test")


def is_of_split(name: str, split: str) -> bool:
    """Whether a word of a file's name names this split."""
    words = set(re.split(r"[^a-z]+", base_name(name).lower()))
    return bool(words & _synonyms(split))


def is_training(split: str) -> bool:
    """Whether this is what a training split is called."""
    return split in _SPLIT_WORDS["train"]


def base_name(name: str) -> str:
    """The last component of a path or URL."""
    return without_query(name).rstrip("/").rpartition("/")[2]


def printable(name: str) -> str:
    """A path with those of its bytes escaped that are not UTF-8, which Python keeps as surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def _synonyms(split: str) -> set[str]:
    return next((words for words in _SPLIT_WORDS.values() if split in words), {split})
