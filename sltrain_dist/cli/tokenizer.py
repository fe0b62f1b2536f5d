"""The `sltrain train-tokenizer` command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sltrain_dist.cli.options import EncodingOption, InputOption, MaxDocumentBytesOption, TextFieldOption, print_table
from sltrain_dist.config.paths import path_option
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.errors import ConfigError
from sltrain_dist.tracking.progress import status_line


class ModelType(StrEnum):
    """Kind of SentencePiece model."""

    unigram = "unigram"
    bpe = "bpe"


def train_tokenizer(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", parser=path_option("--output"), metavar="PATH", help="Model file to write."),
    ],
    inputs: InputOption = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of pieces.")] = 32_000,
    model_type: Annotated[ModelType, typer.Option(help="unigram like T5's, or bpe like LLaMA's.")] = ModelType.unigram,
    sample_bytes: Annotated[int, typer.Option(min=1, help="Bytes of text to sample and train on.")] = 20_000_000,
    character_coverage: Annotated[
        float, typer.Option(min=0.9, max=1, help="Share of the text's characters that get pieces of their own.")
    ] = 0.9995,
    text_field: TextFieldOption = "text",
    encoding: EncodingOption = None,
    max_document_bytes: MaxDocumentBytesOption = MAX_DOCUMENT_BYTES,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
) -> None:
    """Trains a lossless SentencePiece model (byte fallback, no normalisation) and reports its compression.

    Ids are padding 0, end of sequence 1, unknown 2; there is no beginning of sequence. The report is measured on
    held-out documents.
    """
    from sltrain_dist.data import tokenizer
    from sltrain_dist.data.prepare import inputs as files

    if not inputs:
        raise ConfigError("give --input: files or globs of text or JSON lines to train on")
    # A document is only the unit of sampling here, for which whole text files are too coarse.
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
    print_table(
        f"Tokenizer {output}",
        {
            "vocabulary": f"{result.vocab_size:,} pieces",
            "trained on": f"{result.sampled_documents:,} documents, {result.sampled_bytes / 1e6:,.2f} MB",
            "measured on": f"{result.held_out_bytes / 1e6:,.3f} MB of held-out text",
            "bytes per token": f"{result.bytes_per_token:.3f}",
            "unknown tokens": f"{result.unknown_rate:.3%}",
            "byte tokens": f"{result.byte_fallback_rate:.3%}",
            "fingerprint": result.fingerprint,
        },
    )
