"""Continuation of token ids, one token at a time, for a batch of prompts of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sltrain_dist.inference.sampling import Sampling
from sltrain_dist.models.kv_cache import KVCache
from sltrain_dist.models.llama import LlamaForCausalLM

Stop = Literal["end of sequence", "max_new_tokens", "context"]
"""Why a continuation ends: by the model's own end-of-sequence token, after the number of tokens that was asked for, or
because prompt and continuation fill the context."""


@dataclass(frozen=True)
class Limits:
    """When continuations end.

    Attributes:
        max_new_tokens: Most tokens of a continuation.
        context: Most tokens of a prompt and its continuation together. Positions beyond the training's `data.seq_len`
            were never trained.
        vocab_size: Number of ids that the tokenizer knows. Only these are chosen.
        eos_id: The end-of-sequence token, which is not part of a continuation.
    """

    max_new_tokens: int
    context: int
    vocab_size: int
    eos_id: int

    def of(self, prompt: Sequence[int]) -> int:
        """Returns the most tokens that may follow a prompt."""
        return min(self.max_new_tokens, self.context - len(prompt))


class Continuations:
    """The continuations of a batch while they grow.

    Args:
        prompts: Token ids of each prompt: at least one, and fewer than the context.
        limits: When they end.
        token_added: Called with the number of the row and the id of every new token, in the order of the steps.

    Attributes:
        ids: Token ids of each continuation so far.
        stops: Why each has ended; None while it grows.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Limits,
        token_added: Callable[[int, int], None] = lambda row, token: None,
    ) -> None:
        self._limits, self._token_added = limits, token_added
        self._lengths = [limits.of(prompt) for prompt in prompts]
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.stops: list[Stop | None] = [None for _ in prompts]

    @property
    def unfinished(self) -> list[bool]:
        """Whether each continuation still grows."""
        return [stop is None for stop in self.stops]

    def finished(self) -> list[Stop]:
        """Returns why each has ended; only after all have."""
        assert not any(self.unfinished)
        return [stop for stop in self.stops if stop is not None]

    def add(self, tokens: Sequence[int]) -> None:
        """Adds the next token of each row; what is chosen for finished rows is ignored."""
        for row, token in enumerate(tokens):
            if self.stops[row] is not None:
                continue
            if token == self._limits.eos_id:
                self.stops[row] = "end of sequence"
                continue
            self.ids[row].append(token)
            if len(self.ids[row]) == self._lengths[row]:
                self.stops[row] = "max_new_tokens" if self._lengths[row] == self._limits.max_new_tokens else "context"
            self._token_added(row, token)


def pad(prompts: Sequence[Sequence[int]], length: int, device: torch.device | str) -> Tensor:
    """Returns prompts as (batch, length), int64, followed by zeros, which causal attention hides from them."""
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return ids.to(device)


@torch.inference_mode()
def continue_prompts(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sampling: Sampling,
    *,
    numbers: Sequence[int] | None = None,
    token_added: Callable[[int, int], None] = lambda row, token: None,
) -> Continuations:
    """Continues a batch of prompts, with a cache of keys and values.

    Args:
        model: The model; its weights have the type that is computed in.
        prompts: Token ids of each prompt: at least one, and fewer than the context.
        limits: When continuations end.
        sampling: How tokens are chosen.
        numbers: The number of each prompt, for the random numbers. None: 0, 1, …
        token_added: As of :class:`Continuations`.

    Returns:
        The finished continuations.
    """
    embedding = model.model.embed_tokens.weight
    device, lengths = embedding.device, [len(prompt) for prompt in prompts]
    numbers = range(len(prompts)) if numbers is None else numbers
    slots = max(len(prompt) + limits.of(prompt) for prompt in prompts)
    cache = KVCache(model.config, lengths, slots, embedding.dtype, device)
    grown = Continuations(prompts, limits, token_added)
    logits = model(pad(prompts, max(lengths), device), at=torch.tensor(lengths, device=device) - 1, cache=cache)
    for index in range(limits.max_new_tokens):
        tokens = sampling.choose(logits[:, : limits.vocab_size], numbers, index)
        grown.add(tokens.tolist())
        if not any(grown.unfinished):
            break
        cache.advance(torch.tensor(grown.unfinished, device=device))
        logits = model(tokens[:, None], at=torch.zeros_like(tokens), cache=cache)
    return grown
