"""Continuations of a few prompts during training (`eval.samples`), under every engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sltrain_dist.config.schema import Config
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.inference.decoding import Continuations, Limits, pad
from sltrain_dist.inference.text import continuation_text, encode_prompt
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.environment import Environment


class SamplePrompts:
    """The prompts of `eval.samples`, which are continued greedily.

    Every new token takes a forward pass over its batch of prompts, without a cache of keys and values. So it is a pass
    like those of an evaluation, which each engine makes with its own gathers and with compiled layers, and needs no
    more memory. Nothing is drawn at random, and nothing of the run is changed.

    Args:
        config: The configuration.
        tokenizer: The model file of the run's tokenizer.

    Raises:
        ConfigError: A prompt has no tokens, or leaves no room for a new one within data.seq_len.
    """

    def __init__(self, config: Config, tokenizer: Path) -> None:
        self._tokenizer, self._batch = Tokenizer(tokenizer), config.eval_micro_batch
        context = config.data.seq_len
        self._prompts = [
            encode_prompt(text, self._tokenizer, context, f"eval.samples[{index}]")
            for index, text in enumerate(config.eval.samples)
        ]
        self._limits = Limits(config.eval.sample_tokens, context, self._tokenizer.vocab_size, self._tokenizer.eos_id)

    def continued(
        self, engine: Engine, env: Environment, before_pass: Callable[[], None] = lambda: None
    ) -> list[tuple[str, str]]:
        """Returns each prompt with its continuation. All ranks must call this together, and compute the same.

        Args:
            engine: The engine.
            env: The distributed environment.
            before_pass: Called before every pass, equally often on all ranks. Its exceptions end the sampling.
        """
        texts = []
        for first in range(0, len(self._prompts), self._batch):
            batch = self._prompts[first : first + self._batch]
            grown = self._grow([prompt.ids for prompt in batch], engine, env, before_pass)
            texts += [
                (prompt.text, continuation_text(self._tokenizer, prompt.ids, ids))
                for prompt, ids in zip(batch, grown.ids, strict=True)
            ]
        return texts

    def _grow(
        self, prompts: list[list[int]], engine: Engine, env: Environment, before_pass: Callable[[], None]
    ) -> Continuations:
        grown = Continuations(prompts, self._limits)
        length = max(len(prompt) + self._limits.of(prompt) for prompt in prompts)
        # An engine's pass may be a collective: ranks whose rounding chose another token must end with the others.
        while any(env.max([float(each) for each in grown.unfinished])):
            before_pass()
            watchdog.beat("continuing eval.samples")
            read = [[*prompt, *new] for prompt, new in zip(prompts, grown.ids, strict=True)]
            last = torch.tensor([len(ids) - 1 for ids in read], device=env.device)
            logits = engine.next_logits(pad(read, length, env.device), last)
            grown.add(logits[:, : self._limits.vocab_size].argmax(-1).tolist())
        return grown
