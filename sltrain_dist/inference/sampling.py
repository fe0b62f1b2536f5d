"""The choice of a next token from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sltrain_dist.numerics.splitmix import key64, splitmix64


@dataclass(frozen=True)
class Sampling:
    """How next tokens are chosen.

    The random numbers are a function of the seed, the number of the prompt and the position in its continuation. They
    do not depend on the other prompts of a batch, and take nothing from torch's generators.

    Attributes:
        temperature: Logits are divided by it. 0: always the most probable token.
        top_p: Only the most probable tokens are candidates: as few as have at least this probability together, after
            the temperature (nucleus sampling, arXiv 1904.09751). 1: all tokens.
        seed: Keys the random numbers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def choose(self, logits: Tensor, numbers: Sequence[int], index: int) -> Tensor:
        """Chooses a token for each row.

        Args:
            logits: (batch, vocabulary).
            numbers: The number of each row's prompt.
            index: Position of the token in the continuations, counted from 0.

        Returns:
            (batch,), int64, on the device of the logits.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.double()
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # at most 0, however low the temperature
        probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        below = probabilities.cumsum(-1) - probabilities
        candidates = (below < self.top_p).sum(-1, keepdim=True)  # a prefix, and at least the most probable token
        mass = (below + probabilities).gather(-1, candidates - 1)
        drawn = torch.tensor([[self._uniform(number, index)] for number in numbers], dtype=logits.dtype)
        place = (below <= drawn.to(logits.device) * mass).sum(-1, keepdim=True).clamp(max=candidates) - 1
        return tokens.gather(-1, place)[:, 0]

    def _uniform(self, number: int, index: int) -> float:
        """Returns a uniform number in [0, 1)."""
        return int(splitmix64(key64(self.seed, f"sample {number}"), index, 1)[0] >> 11) / 2**53
