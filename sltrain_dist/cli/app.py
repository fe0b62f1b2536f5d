"""The command-line application: all commands, and the exit codes of their errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sltrain_dist.cli.curve import curve
from sltrain_dist.cli.export import export
from sltrain_dist.cli.generate import generate
from sltrain_dist.cli.plan import plan
from sltrain_dist.cli.prepare import prepare_data, prepare_text, prepare_tokens
from sltrain_dist.cli.study import study
from sltrain_dist.cli.tokenizer import train_tokenizer
from sltrain_dist.cli.train import train
from sltrain_dist.cli.verify import verify
from sltrain_dist.errors import ExitCode, SltrainError
from sltrain_dist.files import NO_SPACE
from sltrain_dist.streams import replace_unprintable

app = typer.Typer(
    name="sltrain",
    help="Sparse plus low-rank pretraining, and the tools around it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables truncate option names on a narrow terminal
)
_COMMANDS = (train, curve, study, plan, prepare_text, prepare_tokens, train_tokenizer, export, generate, verify)
for _command in _COMMANDS:
    app.command(_command.__name__.replace("_", "-"))(_command)
_pass_through = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("prepare-data", hidden=True, context_settings=_pass_through)(prepare_data)


@app.callback()
def _sltrain(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Sparse plus low-rank pretraining, and the tools around it."""
    # DeepSpeed's launcher puts its option before the command; it is ignored, because LOCAL_RANK has the same value.


def main() -> None:
    """Runs the command line; an error that a user can cause ends with a message and the documented exit code."""
    replace_unprintable()
    try:
        app(prog_name="sltrain")
    except SltrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        print(f"error: {error.filename or 'the output'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(int(ExitCode.STORAGE))
    except MemoryError as error:
        print(f"error: this machine is out of memory ({str(error) or 'MemoryError'})", file=sys.stderr)
        sys.exit(int(ExitCode.CONFIG))
