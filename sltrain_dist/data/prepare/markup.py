"""Extraction of prose from docstrings and package descriptions: one paragraph per line, no markup or code.

Docstrings are wrapped at a fixed width and mix prose with parameter lists, doctests, tables and directives in
three conventions (reStructuredText, numpydoc, Google); package descriptions add Markdown. Everything
except paragraphs of prose is left out here; C4's line rules (:mod:`.clean`) then see whole paragraphs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator

_UNDERLINE = re.compile(r"\s*([-=~^\"'`#*+.:_])\1{2,}\s*$")
_TABLE_ROW = re.compile(r"\s*[|+]|.*\S(?: {3,}|\t)\S|\s*[=-]{2,}(?:\s+[=-]{2,})+\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")
_DIRECTIVE = re.compile(r"\s*\.\.(?:\s+(?P<name>[\w:-]+)::\s*(?P<rest>.*)|\s.*|$)")
_FIELD = re.compile(r"\s*(?::[\w ]+[^:`]*:(?=\s|$)|@\w+\b|\\\w+\{?)")
_BULLET = re.compile(r"\s*(?:[-*+•]|\(?(?:\d{1,2}|[a-z])[.)]|#+|>)\s+(?=\S)")
_LIST_HEAD = re.compile(
    r"\s*(?:args|arguments|keyword arguments|kwargs|parameters|params|inputs?|outputs?|returns?|yields?|raises?|"
    r"attributes?|methods|examples?|usage|see also|references|options|fields|properties|shapes?|todo)"
    r"\s*(?:\(.*\))?:\s*$",
    re.IGNORECASE,
)
_DEFINITION = re.compile(
    r"\s*(?:[-*+•]\s+)?[`*]{0,2}[a-z_][\w.\-]*[`*]{0,2}\s*(?:\([^)]*\)|\[[^\]]*\])?\s*(?::|--|—|–)\s"
)
_LIST_SECTIONS = re.compile(
    r"(?:other |keyword )?(?:parameters|arguments|args)|returns?|yields|raises|warns|receives|attributes|methods|"
    r"see also|references|options|required modules|requirements|installation|license",
    re.IGNORECASE,
)
_PROSE_DIRECTIVES = {"note", "warning", "tip", "important", "attention", "caution", "hint", "admonition", "danger"}

_INLINE = [  # each with a string that it needs, which saves most paragraphs the search
    ("[`", re.compile(r"\[`([^`]+)`\](?!\()"), r"\1"),  # Markdown link to an object
    ("![", re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),  # Markdown image
    ("[", re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),  # Markdown link
    ("]_", re.compile(r"\s*\[[\w#*.-]+\]_"), ""),  # footnote or citation
    (":`", re.compile(r":[\w:.+-]+:`+~?([^`<]+?)(?:\s*<[^`>]*>)?`+"), r"\1"),  # role
    (">`", re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # link with a target
    ("''", re.compile(r"``([^`']+)''"), r'"\1"'),  # quotation marks as in TeX
    ("`", re.compile(r"`{1,2}([^`]+)`{1,2}(?:__?\b)?"), r"\1"),
    ("<", re.compile(r"<!--.*?-->|</?[A-Za-z][^<>]*>"), ""),
    ("|", re.compile(r"\|([\w .-]+)\|(?:__?)?"), r"\1"),  # substitution
    ("*", re.compile(r"(?<![\w*])\*{1,3}([^\s*](?:[^*]*[^\s*])?)\*{1,3}(?![\w*])"), r"\1"),
    ("\\", re.compile(r"\\([*_`<>\\|-])"), r"\1"),
]
_PROSE_WORD = re.compile(r"\(?[\"'“]?[A-Za-z]+(?:[-'’][A-Za-z]+)*[\"'”]?\)?[.,;:!?]?[\"'”]?\)?")
_CONTINUATION = re.compile(r"[a-z]+[,:;]?")  # the rest of a sentence that was interrupted by a formula or code
_MIN_PLAIN_SHARE = 0.8
_COMMON = {
    "the",
    "a",
    "an",
    "of",
    "to",
    "and",
    "in",
    "is",
    "that",
    "for",
    "with",
    "be",
    "are",
    "it",
    "this",
    "as",
    "on",
}
_COMMON |= {"or", "by", "not", "can", "if", "you", "from"}


def prose(text: str) -> str:
    """Returns the paragraphs of prose in a docstring or description, one per line; empty if there are none."""
    lines = _without_code(_without_sections(_without_fences(inspect.cleandoc(text).splitlines())))
    paragraphs = (_plain(paragraph) for paragraph in _joined(lines))
    return "\n".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))


def _without_fences(lines: Iterable[str]) -> Iterator[str]:
    fence: str | None = None
    for line in lines:
        if match := _FENCE.match(line):
            fence = None if fence == match[1] else fence or match[1]
            yield ""
        elif fence is None:
            yield line


def _without_sections(lines: Iterable[str]) -> Iterator[str]:
    """Drops underlined titles, and numpydoc sections that are lists, up to the next title."""
    skipping = False
    previous: str | None = None  # a line that is a title if an underline follows
    for line in lines:
        if _UNDERLINE.match(line):
            if previous and previous.strip():
                skipping = _LIST_SECTIONS.fullmatch(previous.strip()) is not None
            previous = ""
            continue
        if previous is not None and not skipping:
            yield previous
        previous = line
    if previous is not None and not skipping:
        yield previous


def _without_code(lines: Iterable[str]) -> Iterator[str]:
    """Drops doctests, literal blocks, directives, field lists, definition lists and tables."""
    deeper_than: int | None = None  # lines indented deeper belong to a dropped block
    in_doctest = False
    for line in lines:
        if not line.strip():
            in_doctest = False
            yield ""
            continue
        indent = len(line) - len(line.lstrip())
        if in_doctest or (deeper_than is not None and indent > deeper_than):
            continue
        deeper_than = None
        if line.lstrip().startswith((">>>", "In [")):
            in_doctest = True
            yield ""
        elif match := _DIRECTIVE.match(line):
            is_prose = match["name"] in _PROSE_DIRECTIVES
            deeper_than = None if is_prose else indent
            yield match["rest"] if is_prose else ""
        elif _LIST_HEAD.match(line) or _FIELD.match(line) or _DEFINITION.match(line):
            deeper_than = indent
            yield ""
        elif _TABLE_ROW.match(line):
            yield ""
        else:
            if line.rstrip().endswith("::"):
                deeper_than = indent
            yield line


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Joins paragraphs: consecutive lines of equal indentation. A list item's second line may be deeper."""
    paragraph: list[str] = []
    indent, hanging = 0, False
    for line in lines:
        line_indent = len(line) - len(line.lstrip())
        bullet = _BULLET.match(line)
        continues = paragraph and not bullet and (line_indent == indent or (hanging and line_indent > indent))
        if not line.strip() or not continues:
            if paragraph:
                yield " ".join(paragraph)
            paragraph = []
        if line.strip():
            hanging = bullet is not None
            indent = line_indent
            paragraph.append(line[bullet.end() :] if bullet else line.strip())
    if paragraph:
        yield " ".join(paragraph)


def _plain(paragraph: str) -> str:
    for needed, pattern, replacement in _INLINE:
        if needed in paragraph:
            paragraph = pattern.sub(replacement, paragraph)
    return " ".join(paragraph.split())


def _is_prose(paragraph: str) -> bool:
    """Returns whether most words are plain words and some are English function words (as in Gopher's rules)."""
    words = paragraph.split()
    if not words or _CONTINUATION.fullmatch(words[0]):
        return False
    num_plain = sum(_PROSE_WORD.fullmatch(word) is not None for word in words)
    if num_plain < _MIN_PLAIN_SHARE * len(words):
        return False
    return not _COMMON.isdisjoint(word.lower() for word in words)
