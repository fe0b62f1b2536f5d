"""Standard output and standard error that never fail on a character that their encoding lacks."""

from __future__ import annotations

import io
import sys


def replace_unprintable() -> None:
    """Makes standard output and standard error print "?" for characters that their encoding lacks.

    A terminal or a log may be in Latin-1 or ASCII (`PYTHONIOENCODING`, an old locale), where "→" and "δ" do not exist.
    Every command calls this first. Files are not affected: they are UTF-8 in any locale.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook or a test may have replaced it
            stream.reconfigure(errors="replace")
