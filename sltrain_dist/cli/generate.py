"""The `sltrain generate` command."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sltrain_dist.cli.export import Dtype
from sltrain_dist.cli.options import CheckpointArgument
from sltrain_dist.config.paths import path_option
from sltrain_dist.errors import ConfigError, DataError
from sltrain_dist.tracking.progress import status_line

if TYPE_CHECKING:
    from sltrain_dist.inference.text import Continuation


class DeviceChoice(StrEnum):
    """The device that the model computes on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be repeated.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            parser=path_option("--prompts-file"),
            metavar="PATH",
            help="File with one prompt a line. In a file named *.jsonl, a line is a JSON string, or an object with the "
            "key prompt.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a continuation.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the most probable token; 1 samples from the model.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Samples only from the most probable tokens, as few as have this probability together."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts that are continued together.")] = 8,
    merged: Annotated[
        bool,
        typer.Option(
            "--merged/--factored", help="Whether B, A and S of each layer are merged into a dense weight at the start."
        ),
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Type that is computed in. Default: that of the weights.")] = None,
    device: Annotated[DeviceChoice, typer.Option(help="auto: the first GPU, if there is one.")] = DeviceChoice.auto,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text as it comes; prompts are continued one after another.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each prompt, one a line.")] = False,
) -> None:
    """Continues prompts with a trained model."""
    texts = [*(prompt or ()), *([] if prompts_file is None else _read_prompts(prompts_file))]
    if not texts:
        raise ConfigError("there is nothing to continue; give --prompt TEXT, or --prompts-file FILE")
    _check_options(temperature, top_p, stream=stream, as_json=as_json)

    import torch

    from sltrain_dist.checkpoint.reader import open_newest
    from sltrain_dist.data.tokenizer import Tokenizer
    from sltrain_dist.inference.decoding import Limits
    from sltrain_dist.inference.load_model import load_model
    from sltrain_dist.inference.sampling import Sampling
    from sltrain_dist.inference.text import continue_texts, encode_prompt

    place = _device(device)
    with status_line() as report:
        report(f"checking {checkpoint}")
        reader = open_newest(checkpoint)
        context = reader.config().data.seq_len
        tokenizer = Tokenizer(reader.tokenizer())
        prompts = [encode_prompt(text, tokenizer, context, f"prompt {i}") for i, text in enumerate(texts, start=1)]
        report(f"loading {reader.path}, {'merged' if merged else 'factored'}")
        computed_in = {None: None, Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}[dtype]
        model = load_model(reader, "merged" if merged else "factored", dtype=computed_in, device=place)
    limits = Limits(max_new_tokens, context, tokenizer.vocab_size, tokenizer.eos_id)
    sampling = Sampling(temperature, top_p, seed)
    step = 1 if stream else batch_size
    for first in range(0, len(prompts), step):
        batch = prompts[first : first + step]
        if stream:
            print("\n" * (first > 0) + batch[0].text, end="", flush=True)
        added = _print_piece if stream else None
        done = continue_texts(model, tokenizer, batch, limits, sampling, first_number=first, text_added=added)
        for number, each in enumerate(done, start=first):
            if as_json:
                print(json.dumps(_record(each), ensure_ascii=False), flush=True)
                continue
            print("" if stream else "\n" * (number > 0) + each.prompt.text + each.text, flush=True)
            if each.stop == "context":
                print(
                    f"note: prompt {number + 1} is continued by {each.tokens} tokens only, because the model was "
                    f"trained with data.seq_len = {context}",
                    file=sys.stderr,
                )


def _check_options(temperature: float, top_p: float, *, stream: bool, as_json: bool) -> None:
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature {temperature:g} must be a number that is not negative")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p:g} must be above 0 and at most 1")
    if top_p < 1 and temperature == 0:
        raise ConfigError("--top-p has no effect with --temperature 0; set a temperature, such as --temperature 1")
    if stream and as_json:
        raise ConfigError("--stream prints text and --json prints objects; choose one of them")


def _print_piece(_: int, text: str) -> None:
    print(text, end="", flush=True)


def _record(done: Continuation) -> dict[str, Any]:
    return {
        "prompt": done.prompt.text,
        "continuation": done.text,
        "prompt_tokens": len(done.prompt.ids),
        "tokens": done.tokens,
        "stop": done.stop,
    }


def _device(chosen: DeviceChoice) -> str:
    import torch

    there = torch.cuda.is_available()
    if chosen is DeviceChoice.cuda and not there:
        raise ConfigError("--device cuda: torch finds no GPU; use --device cpu")
    return "cuda" if there and chosen is not DeviceChoice.cpu else "cpu"


def _read_prompts(path: Path) -> list[str]:
    """Reads the prompts of a file; blank lines are left out.

    Raises:
        DataError: It cannot be read, or a line is not a prompt.
    """
    try:
        lines = path.read_bytes().decode().split("\n")  # JSON strings may contain other line separators
    except OSError as error:
        raise DataError(f"--prompts-file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"--prompts-file {path} is not UTF-8; convert it") from None
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    return list(_parse_json(path, numbered)) if path.suffix == ".jsonl" else [line for _, line in numbered]


def _parse_json(path: Path, numbered: Sequence[tuple[int, str]]) -> Iterator[str]:
    for number, line in numbered:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"line {number} of {path} is not JSON") from None
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise DataError(f'line {number} of {path} is neither a string nor an object with "prompt": "…"')
        yield text
