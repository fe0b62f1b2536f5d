"""All commands together, and what becomes of their errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sltrain_dist.cli.export import export
from sltrain_dist.cli.plan import plan
from sltrain_dist.cli.prepare import prepare_data, prepare_text, prepare_tokens
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
    rich_markup_mode=None,  # rich's tables cut the names of options on a narrow terminal
)
for _command in (train, plan, prepare_text, prepare_tokens, train_tokenizer, export, verify):
    app.command(_command.__name__.replace("_", "-"))(_command)
_as_given = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("prepare-data", hidden=True, context_settings=_as_given)(prepare_data)


@app.callback()
def _sltrain(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Sparse plus low-rank pretraining, and the tools around it."""
    # DeepSpeed's launcher puts its option before the command; the environment says the same.


def main() -> None:
    """Entry point: errors that a user can cause become one message and the documented exit code."""
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
