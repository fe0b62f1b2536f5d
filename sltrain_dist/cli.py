"""The `sltrain` command. Commands import what they need when they run, so that `--help` stays fast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sltrain_dist.errors import CheckpointError, ConfigError, DataError, SltrainError
from sltrain_dist.planner.command import plan

app = typer.Typer(
    name="sltrain",
    help="Tools around sparse plus low-rank pretraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class TxtUnit(StrEnum):
    """What a document is in a text file."""

    file = "file"
    paragraph = "paragraph"


class ModelType(StrEnum):
    """Kind of SentencePiece model."""

    unigram = "unigram"
    bpe = "bpe"


class Dtype(StrEnum):
    """Type of exported weights."""

    bf16 = "bf16"
    fp32 = "fp32"


InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", help="File or glob (quote it); may be repeated. Text files and JSON lines, or .gz."),
]
TextFieldOption = Annotated[str, typer.Option(help="Key of the text in JSON lines.")]


@app.callback()
def _sltrain() -> None:
    """Tools around sparse plus low-rank pretraining."""


app.command("plan")(plan)


@app.command("prepare-data")
def prepare_data(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    inputs: InputOption = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Take the prose of the installed Python packages instead of files.")
    ] = False,
    name: Annotated[str, typer.Option(help="How the shards' names begin.")] = "corpus",
    shards: Annotated[int, typer.Option(min=1, max=99_999, help="Shards of the training split.")] = 4,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the documents that is held out.")
    ] = 0.01,
    txt_unit: Annotated[
        TxtUnit, typer.Option(help="What a document is in a text file: all of it, or lines between blank lines.")
    ] = TxtUnit.file,
    text_field: TextFieldOption = "text",
    unwrap: Annotated[
        bool, typer.Option("--unwrap", help="Join the lines of each paragraph: for text wrapped at a fixed width.")
    ] = False,
    clean: Annotated[bool, typer.Option("--clean/--no-clean", help="C4's rules for lines and pages.")] = True,
    dedup: Annotated[
        bool, typer.Option("--dedup/--no-dedup", help="Drop repeated documents and three-sentence spans.")
    ] = True,
    min_sentences: Annotated[int, typer.Option(min=1, help="Sentences that a page must keep.")] = 3,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenize the inputs as they are into token shards, with this model file.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="With --tokenizer: configuration of a Hub dataset.")] = None,
    split: Annotated[str, typer.Option(help="With --tokenizer: split of a Hub dataset.")] = "train",
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="With --tokenizer: largest share of unusable documents.")
    ] = 0.01,
    processes: Annotated[int, typer.Option(min=1, help="With --tokenizer: shards to make at a time.")] = 1,
) -> None:
    """Makes training data.

    Without --tokenizer: a corpus that is cleaned, deduplicated and split, in C4's format (gzipped JSON lines).

    With --tokenizer: token shards, for data.source, of JSON lines that --input names as data.source would (files,
    directories, globs, URLs or a Hub dataset). The same command goes on where an interrupted one stopped.
    """
    from sltrain_dist.data.prepare import build
    from sltrain_dist.data.prepare import embedded as packages

    options = build.PrepareOptions(
        txt_unit=txt_unit.value,
        text_field=text_field,
        unwrap=unwrap,
        clean=clean,
        dedup=dedup,
        min_sentences=min_sentences,
        validation_fraction=validation_fraction,
        num_shards=shards,
    )
    if tokenizer is not None:
        if not inputs or embedded or options != build.PrepareOptions(text_field=text_field) or name != "corpus":
            raise ConfigError(
                "--tokenizer takes --input, --output, --text-field, --subset, --split, --max-bad-fraction and "
                "--processes; to clean text too, prepare it first without --tokenizer"
            )
        _prepare_tokens(inputs, output, tokenizer, text_field, subset, split, max_bad_fraction, processes)
        return
    if (subset, split, max_bad_fraction, processes) != (None, "train", 0.01, 1):
        raise ConfigError("--subset, --split, --max-bad-fraction and --processes go with --tokenizer only")
    if embedded == bool(inputs):
        raise ConfigError("give either --input (files of your own) or --embedded, and not both")
    if embedded and (options != build.PrepareOptions(num_shards=shards) or name != "corpus"):
        raise ConfigError("--embedded has rules of its own: only --output and --shards go with it")
    with _progress() as report:
        if inputs:
            manifest = build.prepare_files(inputs, output, options, name=name, report=report)
        else:
            build.refuse_existing(output)
            manifest = build.build_corpus_of_packages(
                packages.find_installation(), output, num_shards=shards, report=report
            )
    _print_table(
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


def _prepare_tokens(
    inputs: list[str],
    output: Path,
    tokenizer: Path,
    text_field: str,
    subset: str | None,
    split: str,
    max_bad_fraction: float,
    processes: int,
) -> None:
    from sltrain_dist.data.prepare.tokens import prepare_tokens
    from sltrain_dist.data.retry import Fetcher
    from sltrain_dist.data.source import resolve_source

    fetcher = Fetcher(report=lambda line: typer.echo(line, err=True))
    shards = resolve_source(inputs, subset=subset, split=split, key="--input", fetcher=fetcher)
    with _progress_bar("tokenizing", len(shards)) as report:
        manifest = prepare_tokens(
            shards,
            output,
            tokenizer,
            text_field=text_field,
            max_bad_fraction=max_bad_fraction,
            processes=processes,
            report=lambda done, shard: report(done, f"{shard.name}: {shard.documents:,} documents"),
        )
    unusable = {cause: sum(shard.faults.get(cause, 0) for shard in manifest.shards) for cause in manifest.causes}
    _print_table(
        f"Token shards in {output}",
        {
            "shards": f"{len(manifest.shards):,}",
            "documents": f"{sum(shard.documents for shard in manifest.shards):,}",
            "tokens": f"{sum(shard.tokens for shard in manifest.shards):,} ({manifest.job.dtype.name})",
            **{f"unusable: {cause}": f"{count:,}" for cause, count in unusable.items() if count},
            "tokenizer": manifest.job.tokenizer,
        },
    )


@app.command("train-tokenizer")
def train_tokenizer(
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write.")],
    inputs: InputOption = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of pieces.")] = 32_000,
    model_type: Annotated[ModelType, typer.Option(help="unigram as T5's, or bpe as LLaMA's.")] = ModelType.unigram,
    sample_bytes: Annotated[int, typer.Option(min=1, help="Text to train on, sampled from all of it.")] = 20_000_000,
    character_coverage: Annotated[
        float, typer.Option(min=0.9, max=1, help="Share of the text's characters that get pieces of their own.")
    ] = 0.9995,
    text_field: TextFieldOption = "text",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
) -> None:
    """Trains a lossless SentencePiece model (byte fallback, no normalisation) and reports how it does.

    Ids are padding 0, end of sequence 1, unknown 2; there is no beginning of sequence. The report is measured on
    documents that were held out.
    """
    from sltrain_dist.data import tokenizer
    from sltrain_dist.data.prepare import inputs as files

    if not inputs:
        raise ConfigError("give --input: files or globs of text or JSON lines to train on")
    paths = files.find_inputs(inputs)
    with _progress() as report:
        report(f"training {vocab_size} pieces on {len(paths)} file(s)")
        # A document is only the unit of sampling here, and whole text files would be a coarse one.
        documents = (d for p in paths for d in files.read_documents(p, text_field=text_field, txt_unit="paragraph"))
        result = tokenizer.train_tokenizer(
            (document.text for document in documents),
            output,
            vocab_size=vocab_size,
            model_type=model_type.value,
            sample_bytes=sample_bytes,
            character_coverage=character_coverage,
            seed=seed,
        )
    _print_table(
        f"Tokenizer {output}",
        {
            "vocabulary": f"{result.vocab_size:,} pieces",
            "trained on": f"{result.sampled_documents:,} documents, {result.sampled_bytes / 1e6:,.2f} MB",
            "measured on": f"{result.held_out_bytes / 1e6:,.3f} MB that were held out",
            "bytes per token": f"{result.bytes_per_token:.3f}",
            "unknown tokens": f"{result.unknown_rate:.3%}",
            "byte tokens": f"{result.byte_fallback_rate:.3%}",
            "fingerprint": result.fingerprint,
        },
    )


@app.command("export")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory (its newest checkpoint).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    dtype: Annotated[Dtype, typer.Option(help="Type of the exported weights.")] = Dtype.bf16,
) -> None:
    """Exports a checkpoint as a dense Hugging Face LLaMA (safetensors), its sparse and low-rank parts merged."""
    from sltrain_dist.checkpoint.export import export_dense

    with _progress() as report:
        report(f"merging {checkpoint}")
        parameters = export_dense(checkpoint, output, dtype=dtype.value)
    _print_table(f"Model in {output}", {"parameters": f"{parameters:,}", "type": dtype.value})


@app.command("verify")
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, a run directory (all its checkpoints), or token shards.")],
) -> None:
    """Compares files with the sizes and SHA-256 in their manifests.

    The exit code is 5 if a checkpoint is damaged, and 3 if token shards are.
    """
    from sltrain_dist.checkpoint.contents import damage
    from sltrain_dist.checkpoint.manifest import list_directories
    from sltrain_dist.data.token_shards import is_prepared

    if is_prepared(path):
        _verify_tokens(path)
        return
    found = [kept for _, kept in list_directories(path / "checkpoints")] or [path]
    damaged = []
    for checkpoint in found:  # whole lines, however narrow the terminal: a path that is cut cannot be copied
        problem = damage(checkpoint)
        typer.echo(f"{checkpoint.name}: {problem or 'whole'}")
        if problem is not None:
            damaged.append(checkpoint.name)
    if damaged:
        raise CheckpointError(f"damaged: {', '.join(damaged)}")


def _verify_tokens(path: Path) -> None:
    from sltrain_dist.data.token_shards import damage, open_manifest

    manifest = open_manifest(path)
    problems: list[str] = []
    with _progress_bar("verifying", len(manifest.shards)) as report:
        for number, shard in enumerate(manifest.shards, start=1):
            problems += filter(None, [damage(path, shard)])
            report(number, shard.name)
    if problems:
        raise DataError(f"damaged: {'; '.join(problems)}. The `sltrain prepare-data` that made them makes them anew")
    typer.echo(f"{path}: whole")


def main() -> None:
    """Entry point: errors that a user can cause become one message and the documented exit code."""
    try:
        app()
    except SltrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Takes lines on what is being done: one that changes on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda line: status.update(line)
    else:
        yield lambda line: print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress_bar(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Takes the number of finished parts and a note: a bar on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, note: print(f"{done}/{total} {note}", file=sys.stderr, flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def _print_table(title: str, rows: Mapping[str, str]) -> None:
    table = Table("", "", title=title, title_justify="left", show_header=False, box=None)
    for key, value in rows.items():
        table.add_row(key, value)
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
