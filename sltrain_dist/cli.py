"""The `sltrain` command. Commands import what they need when they run, so that `--help` stays fast."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sltrain_dist.config.paths import path_option
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.errors import CheckpointError, ConfigError, DataError, ExitCode, SltrainError
from sltrain_dist.files import NO_SPACE
from sltrain_dist.plan.command import plan
from sltrain_dist.streams import replace_unprintable
from sltrain_dist.tracking.progress import progress_bar, status_line

app = typer.Typer(
    name="sltrain",
    help="Sparse plus low-rank pretraining, and the tools around it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut the names of options on a narrow terminal
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
    typer.Option(
        "--input",
        "-i",
        parser=path_option("--input", str),
        metavar="PATH",
        help="File, directory, glob (quote it), URL or Hub dataset; may be repeated. Text files and JSON lines (also "
        ".gz, .bz2, .xz, .zst), Parquet, Arrow.",
    ),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", parser=path_option("--output"), metavar="PATH", help="Directory to make.")
]
TextFieldOption = Annotated[str, typer.Option(help="Key of the text in JSON lines, or column of a table.")]
EncodingOption = Annotated[
    str | None,
    typer.Option(
        help="Encoding of text files and JSON lines, such as latin-1, cp1252 or utf-16-le. Default: UTF-8, or UTF-16 "
        "and UTF-32 where a file's beginning says so."
    ),
]
MaxDocumentBytesOption = Annotated[
    int, typer.Option(min=1, help="Longest document in bytes, as data.max_document_bytes in training.")
]


@app.callback()
def _sltrain(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Sparse plus low-rank pretraining, and the tools around it."""
    # DeepSpeed's launcher puts its option before the command; the environment says the same.


@app.command("train")
def train(
    config: Annotated[
        Path, typer.Option(parser=path_option("--config"), metavar="FILE", help="YAML file: what to train, and how.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Values that win over the file's.")
    ] = None,
    print_run_dir: Annotated[bool, typer.Option("--print-run-dir", help="Only print where exit.json will be.")] = False,
) -> None:
    """Pretrains a model, as launch/pretrain.py does.

    One process: sltrain train --config FILE. Several: torchrun --nproc-per-node N -m sltrain_dist train --config FILE,
    and likewise deepspeed --module sltrain_dist, or srun python -m sltrain_dist.

    Exit codes: 0 done, 1 a crash or another process lost, 2 configuration, 3 data, 4 diverged, 5 checkpoint, 6 storage,
    75 stopped early with everything saved. Launchers lose them; exit.json in the run directory does not.
    """
    from sltrain_dist.train import run

    start = run.print_run_dir if print_run_dir else run.pretrain
    raise typer.Exit(int(start(str(config), overrides or [])))


app.command("plan")(plan)


@app.command("prepare-data")
def prepare_data(
    output: OutputOption,
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
    encoding: EncodingOption = None,
    max_document_bytes: MaxDocumentBytesOption = MAX_DOCUMENT_BYTES,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            parser=path_option("--tokenizer"),
            metavar="PATH",
            help="Tokenize the inputs as they are into token shards, with this model file.",
        ),
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

    With --tokenizer: token shards, for data.source, of the documents that --input names as data.source would. The same
    command goes on where an interrupted one stopped.
    """
    from sltrain_dist.data.prepare import build
    from sltrain_dist.data.prepare import embedded as packages
    from sltrain_dist.data.prepare.inputs import InputOptions

    options = build.PrepareOptions(
        inputs=InputOptions(txt_unit.value, text_field, encoding, max_document_bytes),
        unwrap=unwrap,
        clean=clean,
        dedup=dedup,
        min_sentences=min_sentences,
        validation_fraction=validation_fraction,
        num_shards=shards,
    )
    if tokenizer is not None:
        plain = build.PrepareOptions(InputOptions(text_field=text_field, max_document_bytes=max_document_bytes))
        if not inputs or embedded or options != plain or name != "corpus":
            raise ConfigError(
                "--tokenizer takes --input, --output, --text-field, --max-document-bytes, --subset, --split, "
                "--max-bad-fraction and --processes; to clean text too, prepare it first without --tokenizer"
            )
        _prepare_tokens(
            inputs, output, tokenizer, text_field, max_document_bytes, subset, split, max_bad_fraction, processes
        )
        return
    if (subset, split, max_bad_fraction, processes) != (None, "train", 0.01, 1):
        raise ConfigError("--subset, --split, --max-bad-fraction and --processes go with --tokenizer only")
    if embedded == bool(inputs):
        raise ConfigError("give either --input (files of your own) or --embedded, and not both")
    if embedded and (options != build.PrepareOptions(num_shards=shards) or name != "corpus"):
        raise ConfigError("--embedded has rules of its own: only --output and --shards go with it")
    with status_line() as report:
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
    max_document_bytes: int,
    subset: str | None,
    split: str,
    max_bad_fraction: float,
    processes: int,
) -> None:
    from sltrain_dist.data.prepare.tokens import prepare_tokens
    from sltrain_dist.data.sources.resolve import resolve_source
    from sltrain_dist.data.sources.retry import Fetcher

    def say(line: str) -> None:
        typer.echo(line, err=True)

    shards = resolve_source(inputs, subset=subset, split=split, key="--input", fetcher=Fetcher(report=say), report=say)
    with progress_bar("tokenizing", len(shards)) as report:
        manifest = prepare_tokens(
            shards,
            output,
            tokenizer,
            text_field=text_field,
            max_bad_fraction=max_bad_fraction,
            max_document_bytes=max_document_bytes,
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
    output: Annotated[
        Path,
        typer.Option("--output", "-o", parser=path_option("--output"), metavar="PATH", help="Model file to write."),
    ],
    inputs: InputOption = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of pieces.")] = 32_000,
    model_type: Annotated[ModelType, typer.Option(help="unigram as T5's, or bpe as LLaMA's.")] = ModelType.unigram,
    sample_bytes: Annotated[int, typer.Option(min=1, help="Text to train on, sampled from all of it.")] = 20_000_000,
    character_coverage: Annotated[
        float, typer.Option(min=0.9, max=1, help="Share of the text's characters that get pieces of their own.")
    ] = 0.9995,
    text_field: TextFieldOption = "text",
    encoding: EncodingOption = None,
    max_document_bytes: MaxDocumentBytesOption = MAX_DOCUMENT_BYTES,
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
    # A document is only the unit of sampling here, and whole text files would be a coarse one.
    options = files.InputOptions("paragraph", text_field, encoding, max_document_bytes)
    with status_line() as report:
        shards = files.find_inputs(inputs, report)
        report(f"training {vocab_size} pieces on {len(shards)} file(s)")
        documents = (document for shard in shards for document in files.read_documents(shard, options))
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
    checkpoint: Annotated[
        Path,
        typer.Argument(
            parser=path_option("CHECKPOINT"), help="A checkpoint, or a run directory (its newest checkpoint)."
        ),
    ],
    output: OutputOption,
    dtype: Annotated[Dtype, typer.Option(help="Type of the exported weights.")] = Dtype.bf16,
) -> None:
    """Exports a checkpoint as a dense Hugging Face LLaMA (safetensors), its sparse and low-rank parts merged."""
    from sltrain_dist.checkpoint.export import export_dense

    with status_line() as report:
        report(f"merging {checkpoint}")
        parameters = export_dense(checkpoint, output, dtype=dtype.value)
    _print_table(f"Model in {output}", {"parameters": f"{parameters:,}", "type": dtype.value})


@app.command("verify")
def verify(
    path: Annotated[
        Path,
        typer.Argument(
            parser=path_option("PATH"), help="A checkpoint, a run directory (all its checkpoints), or token shards."
        ),
    ],
) -> None:
    """Compares files with the sizes and SHA-256 in their manifests.

    The exit code is 5 if a checkpoint is damaged, and 3 if token shards are.
    """
    from sltrain_dist.checkpoint.contents import damage
    from sltrain_dist.checkpoint.manifest import list_directories
    from sltrain_dist.data.sources.token_shards import is_prepared

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
    from sltrain_dist.data.sources.token_shards import damage, open_manifest

    manifest = open_manifest(path)
    problems: list[str] = []
    with progress_bar("verifying", len(manifest.shards)) as report:
        for number, shard in enumerate(manifest.shards, start=1):
            problems += filter(None, [damage(path, shard)])
            report(number, shard.name)
    if problems:
        raise DataError(f"damaged: {'; '.join(problems)}. The `sltrain prepare-data` that made them makes them anew")
    typer.echo(f"{path}: whole")


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


def _print_table(title: str, rows: Mapping[str, str]) -> None:
    """Prints a title and its rows as plain lines: a terminal that is too narrow breaks them and cuts nothing."""
    width = max(map(len, rows), default=0)
    print(title)
    for key, value in rows.items():
        print(f"  {key:<{width}}  {value}")


if __name__ == "__main__":
    main()
