"""The `sltrain` command. Every subcommand is a module that only parses arguments and prints.

Commands import what they need when they run, so that `--help` stays fast.
"""

import gc

gc.disable()  # imports make many objects but no garbage; collecting it would take a tenth of a plan's time

from sltrain_dist.cli.app import app, main  # noqa: E402

gc.freeze()
gc.enable()

__all__ = ["app", "main"]
