"""C4's cleaning rules and deduplication (T5 paper, arXiv 1910.10683, section 2.2).

Followed: a line is kept if it ends in terminal punctuation, has at least five words, does not mention
Javascript and is not a cookie or privacy notice; a page is dropped if it contains "lorem ipsum" or a curly
bracket, or keeps fewer than three sentences; of a repeated three-sentence span, only the first occurrence is
kept; Wikipedia's citation marks are removed. As in the authors' code, lines that end in an ellipsis or have
a word of more than 1000 characters are dropped too.

Not followed: the list of bad words (not ours to ship) and language detection (needs another model).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

_TERMINAL = (".", "!", "?", '"', "”")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")
_ABBREVIATION = re.compile(r"(?:\b(?:[A-Za-z]|e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|Ms|Prof|St|Fig|No|al))\.$")
_MAX_WORD_CHARS = 1000
_SPAN = 3


@dataclass(frozen=True)
class Rules:
    """Settings of the cleaning rules; the defaults are those of C4."""

    min_words: int = 5
    """Words that a line must have."""
    min_sentences: int = 3
    """Sentences that a page must keep."""
    curly: Literal["page", "line"] = "page"
    """What a curly bracket drops: the page, or only its line, for text whose code has been removed already."""


@dataclass
class Cleaner:
    """Applies the cleaning rules, and counts the dropped pages."""

    rules: Rules = field(default_factory=Rules)
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped pages by reason."""

    def clean(self, text: str) -> str | None:
        """Returns the lines of a page that pass, or None if the page is dropped."""
        lowered = text.lower()
        if "lorem ipsum" in lowered:
            self.dropped["lorem ipsum"] += 1
            return None
        if self.rules.curly == "page" and "{" in text:
            self.dropped["curly bracket"] += 1
            return None
        lines = [line for raw in text.splitlines() if self._passes(line := _CITATION.sub("", raw).strip())]
        if not lines:
            self.dropped["no line passes"] += 1
            return None
        if sum(len(split_sentences(line)) for line in lines) < self.rules.min_sentences:
            self.dropped["too few sentences"] += 1
            return None
        return "\n".join(lines)

    def _passes(self, line: str) -> bool:
        if not line.endswith(_TERMINAL) or line.endswith("..."):
            return False
        words = line.split()
        if len(words) < self.rules.min_words or max(map(len, words)) > _MAX_WORD_CHARS:
            return False
        if self.rules.curly == "line" and "{" in line:
            return False
        lowered = line.lower()
        return "javascript" not in lowered and not any(phrase in lowered for phrase in _POLICY)


@dataclass
class Deduplicator:
    """Drops repeated documents and repeated spans of three sentences.

    It keeps a hash of 8 bytes per document and per sentence, which takes about 100 bytes of memory per sentence.
    """

    min_sentences: int = Rules.min_sentences
    """Documents with fewer sentences after the removal of spans are dropped."""
    dropped: Counter[str] = field(default_factory=Counter)
    _documents: set[int] = field(default_factory=set)
    _spans: set[int] = field(default_factory=set)

    def keep(self, text: str) -> str | None:
        """Returns the document without repeated spans, or None if it is repeated or too little is left."""
        key = _hash(_normalised(text))
        if key in self._documents:
            self.dropped["duplicate"] += 1
            return None
        self._documents.add(key)
        lines = [split_sentences(line) for line in text.splitlines()]
        places = [(i, j) for i, line in enumerate(lines) for j in range(len(line))]
        keys = [_normalised(lines[i][j]) for i, j in places]
        repeated: set[tuple[int, int]] = set()
        for start in range(len(keys) - _SPAN + 1):
            span = _hash("\n".join(keys[start : start + _SPAN]))
            if span in self._spans:
                repeated.update(places[start : start + _SPAN])
            self._spans.add(span)
        if not repeated:
            return text
        if len(places) - len(repeated) < self.min_sentences:
            self.dropped["repeated spans"] += 1
            return None
        kept = [[s for j, s in enumerate(line) if (i, j) not in repeated] for i, line in enumerate(lines)]
        return "\n".join(" ".join(line) for line in kept if line)


def split_sentences(line: str) -> list[str]:
    """Splits a line of English prose into sentences, at punctuation before a capital letter or a digit."""
    sentences: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(line):
        candidate = line[start : match.end()].rstrip()
        if not _ABBREVIATION.search(candidate[-8:]):
            sentences.append(candidate)
            start = match.end()
    if rest := line[start:].strip():
        sentences.append(rest)
    return sentences


def unwrap(text: str) -> str:
    """Joins the lines between blank lines, for text wrapped at a fixed width."""
    return "\n".join(" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip())


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _hash(text: str) -> int:
    """Returns a 64-bit hash that is the same in every process (unlike hash())."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
