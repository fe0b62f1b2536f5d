"""The `sltrain` command: one module a command, with nothing but arguments and printing.

Commands import what they need when they run, so that `--help` stays fast.
"""

from sltrain_dist.cli.app import app, main

__all__ = ["app", "main"]
