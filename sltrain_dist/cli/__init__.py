"""The `sltrain` command: one module a command, with nothing but arguments and printing.

Commands import what they need when they run, so that `--help` stays fast.
"""

import gc

gc.disable()  # imports make many objects and no garbage, and looking for some takes a tenth of a plan's time

from sltrain_dist.cli.app import app, main  # noqa: E402

gc.freeze()
gc.enable()

__all__ = ["app", "main"]
