"""Standard output and standard error that no character can bring down."""

from __future__ import annotations

import io
import sys


def replace_unprintable() -> None:
    """Lets standard output and standard error print "?" for what their encoding lacks, instead of failing.

    A terminal or a log may be in Latin-1 or ASCII (`PYTHONIOENCODING`, an old locale), where "→" and "δ" do not exist.
    Every command calls this first. Files are not concerned: they are UTF-8 whatever the locale.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a notebook or a test has put its own in the place
            stream.reconfigure(errors="replace")
