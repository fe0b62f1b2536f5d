from __future__ import annotations

import pytest

from sltrain_dist.data.prepare.clean import Cleaner, Deduplicator, Rules, split_sentences, unwrap
from sltrain_dist.data.prepare.markup import prose

PAGE = "This is the first sentence. Here comes the second one.\nThe third one stands alone here."


def test_a_good_page_is_unchanged() -> None:
    cleaner = Cleaner()
    assert cleaner.clean(PAGE) == PAGE
    assert not cleaner.dropped


@pytest.mark.parametrize(
    "line",
    [
        "No terminal punctuation ends this line",
        "Only four words here.",
        "This line trails off into an ellipsis...",
        "Please enable JavaScript to see this page.",
        "Read our privacy policy before you go on.",
        "This site uses cookies to improve your visit.",
        "A word that is too long: " + "x" * 1001 + ".",
        "",
    ],
)
def test_lines_that_go(line: str) -> None:
    assert Cleaner().clean(f"{PAGE}\n{line}\nThis line stays where it is.") == f"{PAGE}\nThis line stays where it is."


@pytest.mark.parametrize(
    "line", ["Is this a question that stays?", "What a fine line it is!", 'He said "that is all there is."']
)
def test_lines_that_stay(line: str) -> None:
    assert Cleaner().clean(f"{PAGE}\n{line}") == f"{PAGE}\n{line}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{PAGE}\nLorem ipsum dolor sit amet.", "lorem ipsum"),
        (f"{PAGE}\nint main() {{", "curly bracket"),
        ("Only two sentences are here. This is the second.", "too few sentences"),
        ("Menu\nHome\nAbout us", "no line passes"),
    ],
)
def test_pages_that_go(text: str, reason: str) -> None:
    cleaner = Cleaner()
    assert cleaner.clean(text) is None
    assert dict(cleaner.dropped) == {reason: 1}


def test_curly_brackets_may_cost_the_line_only() -> None:
    assert Cleaner(Rules(curly="line")).clean(f"{PAGE}\nThe set {{1, 2}} is a set.") == PAGE


def test_bounds_can_be_set_and_citations_go() -> None:
    assert Cleaner(Rules(min_words=2, min_sentences=1)).clean("So be it[3].") == "So be it."


def test_sentences() -> None:
    line = 'Dr. Smith (e.g. of Mr. B. Jones) came. "Did he?" Yes! It cost 3.5 dollars, i.e. nothing. 12 left.'
    assert split_sentences(line) == [
        "Dr. Smith (e.g. of Mr. B. Jones) came.",
        '"Did he?"',
        "Yes!",
        "It cost 3.5 dollars, i.e. nothing.",
        "12 left.",
    ]


def test_duplicate_documents_go_whatever_their_case_and_space() -> None:
    deduplicator = Deduplicator(1)
    assert deduplicator.keep("One document. It is short.") is not None
    assert deduplicator.keep("one  DOCUMENT.\nIt is short!") is None
    assert dict(deduplicator.dropped) == {"duplicate": 1}


def test_repeated_spans_of_three_sentences_go() -> None:
    deduplicator = Deduplicator(min_sentences=2)
    shared = "Alpha comes first. Beta comes second. Gamma comes third."
    assert deduplicator.keep(shared) == shared
    kept = deduplicator.keep(f"Something new. {shared}\nAnd something else. The very end.")
    assert kept == "Something new.\nAnd something else. The very end."
    assert deduplicator.keep(f"{shared} Too little.") is None
    assert dict(deduplicator.dropped) == {"repeated spans": 1}
    two = "Alpha comes first. Beta comes second. But this differs."
    assert deduplicator.keep(two) == two


def test_unwrap() -> None:
    assert unwrap("Two lines\n  of one.\n\n\nAnother\none.\n \nThird.") == "Two lines of one.\nAnother one.\nThird."


NUMPYDOC = """Compute the thing, with a summary that
    is wrapped over two lines.

    The long explanation uses ``code``, :func:`~package.module.function`, `a link <https://x.org>`_ and *emphasis*,
    and cites a paper [1]_ as docstrings do.

    Parameters
    ----------
    x : array_like
        The values that are computed with.

    Notes
    -----
    The formula of the paper is this one::

        y = x ** 2

    It is applied to each of the elements.

    .. math:: y = x^2

    .. versionadded:: 1.2
       The keyword that nobody uses.

    .. note:: This is a note that is worth reading.

    - The first item of the list is
      wrapped as well.
    - The second item is not.

    Examples
    --------
    This is how it is called in practice.

    >>> f(2)
    The result is the number 4.
    """


def test_prose_of_a_numpydoc_docstring() -> None:
    assert prose(NUMPYDOC).splitlines() == [
        "Compute the thing, with a summary that is wrapped over two lines.",
        "The long explanation uses code, package.module.function, a link and emphasis, "
        "and cites a paper as docstrings do.",
        "The formula of the paper is this one::",
        "It is applied to each of the elements.",
        "This is a note that is worth reading.",
        "The first item of the list is wrapped as well.",
        "The second item is not.",
        "This is how it is called in practice.",
    ]


def test_prose_of_a_google_docstring() -> None:
    text = """Does what is asked.

        Args:
            name (str): The name that is used for it.
                It goes on in the next line.

        Returns:
            The value that was asked for.

        Raises:
            ValueError: if the name is not known.

        This is the last paragraph of it.
        :param other: is not prose in the least.
        """
    assert prose(text).splitlines() == ["Does what is asked.", "This is the last paragraph of it."]


def test_prose_of_markdown() -> None:
    text = """# The title of the package

[![badge](https://b/x.svg)](https://b) <p align="center">This is <b>the</b> introduction.</p>

```python
print("This is the code of it.")
```

| a | table |
|---|-------|

It is **fast**, as [the page](https://x.org) says.
"""
    assert prose(text).splitlines()[-2:] == ["This is the introduction.", "It is fast, as the page says."]
    assert "code" not in prose(text) and "table" not in prose(text)


@pytest.mark.parametrize("text", ["", "x = y + z / 3 - the[0] ** 2", "where it goes on after a formula.", "Ẽ ß ñ"])
def test_what_is_not_prose(text: str) -> None:
    assert prose(text) == ""
