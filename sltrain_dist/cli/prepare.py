"""The `sltrain prepare-text` and `sltrain prepare-tokens` commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sltrain_dist.cli.options import (
    EncodingOption,
    InputOption,
    MaxDocumentBytesOption,
    OutputOption,
    TextFieldOption,
    print_table,
)
from sltrain_dist.config.paths import path_option
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.errors import ConfigError
from sltrain_dist.tracking.progress import progress_bar, status_line


class TxtUnit(StrEnum):
    """Unit of a text file that is a document."""

    file = "file"
    paragraph = "paragraph"


def prepare_text(
    output: OutputOption,
    inputs: InputOption = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Use the prose of the installed Python packages instead of files.")
    ] = False,
    name: Annotated[str, typer.Option(help="Prefix of the shards' names.")] = "corpus",
    shards: Annotated[int, typer.Option(min=1, max=99_999, help="Number of shards of the training split.")] = 4,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the documents that is held out.")
    ] = 0.01,
    txt_unit: Annotated[
        TxtUnit, typer.Option(help="Unit of a text file that is a document: all of it, or lines between blank lines.")
    ] = TxtUnit.file,
    text_field: TextFieldOption = "text",
    unwrap: Annotated[
        bool, typer.Option("--unwrap", help="Join the lines of each paragraph: for text wrapped at a fixed width.")
    ] = False,
    clean: Annotated[bool, typer.Option("--clean/--no-clean", help="Apply C4's rules for lines and pages.")] = True,
    dedup: Annotated[
        bool, typer.Option("--dedup/--no-dedup", help="Drop repeated documents and three-sentence spans.")
    ] = True,
    min_sentences: Annotated[int, typer.Option(min=1, help="Number of sentences that must remain of a page.")] = 3,
    encoding: EncodingOption = None,
    max_document_bytes: MaxDocumentBytesOption = MAX_DOCUMENT_BYTES,
) -> None:
    """Makes a corpus that is cleaned, deduplicated and split, in C4's format (gzipped JSON lines).

    The resulting directory can be used as data.source and as eval.source.
    """
    from sltrain_dist.data.prepare import embedded as packages
    from sltrain_dist.data.prepare import make_corpus
    from sltrain_dist.data.prepare.inputs import InputOptions

    options = make_corpus.PrepareOptions(
        inputs=InputOptions(txt_unit.value, text_field, encoding, max_document_bytes),
        unwrap=unwrap,
        clean=clean,
        dedup=dedup,
        min_sentences=min_sentences,
        validation_fraction=validation_fraction,
        num_shards=shards,
    )
    if embedded == bool(inputs):
        raise ConfigError("give either --input (your own files) or --embedded, not both")
    if embedded and (options != make_corpus.PrepareOptions(num_shards=shards) or name != "corpus"):
        raise ConfigError("--embedded has its own rules: only --output and --shards can be combined with it")
    with status_line() as report:
        if inputs:
            manifest = make_corpus.prepare_files(inputs, output, options, name=name, report=report)
        else:
            make_corpus.refuse_existing(output)
            manifest = make_corpus.build_corpus_of_packages(
                packages.find_installation(), output, num_shards=shards, report=report
            )
    print_table(
        f"Corpus in {output}",
        {
            **{
                f"{split} documents": f"{counts.documents:,} ({counts.text_bytes / 1e6:,.2f} MB of text)"
                for split, counts in manifest.splits.items()
            },
            **{f"dropped: {reason}": f"{count:,}" for reason, count in manifest.dropped.items()},
            "fingerprint": manifest.fingerprint,
        },
    )


def prepare_tokens(
    output: OutputOption,
    tokenizer: Annotated[
        Path, typer.Option(parser=path_option("--tokenizer"), metavar="PATH", help="SentencePiece model file.")
    ],
    inputs: InputOption = None,
    text_field: TextFieldOption = "text",
    max_document_bytes: MaxDocumentBytesOption = MAX_DOCUMENT_BYTES,
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="Largest share of unusable documents.")] = 0.01,
    processes: Annotated[int, typer.Option(min=1, help="Number of shards to make in parallel.")] = 1,
) -> None:
    """Makes token shards, for data.source, from the documents of --input, which is written like data.source.

    Text is tokenized as it is; to clean it first, make a corpus with prepare-text. Running the same command again
    continues an interrupted one.
    """
    from sltrain_dist.data.prepare import tokens
    from sltrain_dist.data.sources.resolve import resolve_source
    from sltrain_dist.data.sources.retry import Fetcher

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if not inputs:
        raise ConfigError("give --input: the documents to tokenize, as in data.source")
    found = resolve_source(inputs, subset=subset, split=split, key="--input", fetcher=Fetcher(report=say), report=say)
    with progress_bar("tokenizing", len(found)) as report:
        manifest = tokens.prepare_tokens(
            found,
            output,
            tokenizer,
            text_field=text_field,
            max_bad_fraction=max_bad_fraction,
            max_document_bytes=max_document_bytes,
            processes=processes,
            report=lambda done, shard: report(done, f"{shard.name}: {shard.documents:,} documents"),
        )
    unusable = {cause: sum(shard.faults.get(cause, 0) for shard in manifest.shards) for cause in manifest.causes}
    print_table(
        f"Token shards in {output}",
        {
            "shards": f"{len(manifest.shards):,}",
            "documents": f"{sum(shard.documents for shard in manifest.shards):,}",
            "tokens": f"{sum(shard.tokens for shard in manifest.shards):,} ({manifest.job.dtype.name})",
            **{f"unusable: {cause}": f"{count:,}" for cause, count in unusable.items() if count},
            "tokenizer": manifest.job.tokenizer,
        },
    )


def prepare_data(context: typer.Context) -> None:
    """Deprecated alias of prepare-text, and with --tokenizer of prepare-tokens."""
    given = {argument.partition("=")[0] for argument in context.args}
    command = "prepare-tokens" if "--tokenizer" in given else "prepare-text"
    typer.echo(f"note: `sltrain prepare-data` is deprecated; use `sltrain {command}`", err=True)
    assert context.parent is not None  # the group of all commands
    context.parent.command.main([command, *context.args], prog_name="sltrain", standalone_mode=False)
