"""Continues prompts that are given as text, and returns text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.errors import ConfigError
from sltrain_dist.inference.decoding import Limits, Stop, continue_prompts
from sltrain_dist.inference.sampling import Sampling
from sltrain_dist.models.llama import LlamaForCausalLM

_INCOMPLETE = "\ufffd"
"""SentencePiece decodes the bytes of an incomplete character to this one."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text and its token ids."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Continuation:
    """A prompt's continuation."""

    prompt: Prompt
    text: str
    """The new text alone."""
    tokens: int
    """Number of new tokens, without the end of the sequence."""
    stop: Stop


def encode_prompt(text: str, tokenizer: Tokenizer, context: int, key: str) -> Prompt:
    """Tokenizes a prompt as training tokenizes the beginning of a document.

    Args:
        text: The prompt.
        tokenizer: The tokenizer of the run.
        context: The run's `data.seq_len`.
        key: What an error calls the prompt, such as "prompt 1".

    Raises:
        ConfigError: It is not valid text, has no tokens, or leaves no room for a new token in the context.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: of an argument that is not UTF-8, or of an escape in JSON
        raise ConfigError(f"{key} is not valid UTF-8; convert it") from None
    ids = tokenizer.encode([text])[0].tolist()
    if not ids:
        raise ConfigError(f"{key} is {text!r}, which has no tokens; begin with at least one word")
    if len(ids) >= context:
        raise ConfigError(
            f"{key} has {len(ids)} tokens, but a prompt and its continuation must fit into data.seq_len = {context}, "
            f"because the model learns no later positions; shorten it to at most {context - 1} tokens"
        )
    return Prompt(text, ids)


class TextStream:
    """The text of a growing continuation, in pieces that can be printed as they come.

    The pieces are those of the whole text: a word keeps the space before it, and a character that consists of several
    byte tokens comes as one.

    Args:
        tokenizer: The tokenizer.
        prompt: Token ids before the continuation.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(prompt)
        self._printed = len(tokenizer.decode(prompt))

    def add(self, token: int) -> str:
        """Returns the text that a token completes; empty within a character."""
        self._ids.append(token)
        return self._take(self._tokenizer.decode(self._ids).rstrip(_INCOMPLETE))

    def finish(self) -> str:
        """Returns what is left at the end: a character that remains incomplete, if anything."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        new = text[self._printed :]
        self._printed += len(new)
        return new


def continue_texts(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    limits: Limits,
    sampling: Sampling,
    *,
    first_number: int = 0,
    text_added: Callable[[int, str], None] | None = None,
) -> list[Continuation]:
    """Returns the continuations of a batch of prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: The prompts, which are continued together.
        limits: When continuations end.
        sampling: How tokens are chosen.
        first_number: Number of the first prompt among all batches, for the random numbers.
        text_added: Called with the index of a prompt and every new piece of its continuation. None: nobody reads
            them before the end.
    """
    streams = [TextStream(tokenizer, prompt.ids) for prompt in prompts]

    def token_added(row: int, token: int) -> None:
        if text_added is not None:
            text_added(row, streams[row].add(token))

    ids = [prompt.ids for prompt in prompts]
    numbers = range(first_number, first_number + len(prompts))
    grown = continue_prompts(model, ids, limits, sampling, numbers=numbers, token_added=token_added)
    if text_added is not None:
        for row, stream in enumerate(streams):
            text_added(row, stream.finish())
    return [
        Continuation(prompt, continuation_text(tokenizer, prompt.ids, new), len(new), stop)
        for prompt, new, stop in zip(prompts, grown.ids, grown.finished(), strict=True)
    ]


def continuation_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text of token ids that follow a prompt, with the space before its first word."""
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
