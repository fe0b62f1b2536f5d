"""Keys and values of the tokens that a model has read, so that each further token takes one pass over that token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sltrain_dist.config.schema import ModelConfig


class KVCache:
    """Keys and values of all decoder layers for a batch of rows, and the attention over them.

    The first forward pass reads the prompts, which begin at position 0 and are padded at the end to one length. It
    computes as in training: causal attention hides the padding, and its keys and values are overwritten later. Every
    further pass reads one token of each row, at the row's own next position, after :meth:`advance`. A row attends only
    to itself and only to its own tokens, so that other rows of the batch do not change what it computes.

    Args:
        config: Shape of the model.
        lengths: Number of tokens in the prompt of each row.
        slots: Largest number of tokens of a row, prompt included.
        dtype: Type of the keys and values.
        device: Their device.

    Attributes:
        positions: (batch, 1), int64: the position of each row's next token. None while the prompts are read.
    """

    def __init__(
        self,
        config: ModelConfig,
        lengths: Sequence[int],
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (config.num_layers, len(lengths), config.kv_heads, slots, config.head_dim)
        # Zeros, because values that are not finite would spread from a masked slot: 0 · NaN is NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._lengths = torch.tensor(lengths, device=device)
        self._rows = torch.arange(len(lengths), device=device)
        self._alike = len(set(lengths)) == 1
        self._used, self._slots = max(lengths), slots
        self._mask: Tensor | None = None
        self.positions: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self._keys.nbytes + self._values.nbytes

    def advance(self, unfinished: Tensor) -> None:
        """Prepares a pass that reads one token of each row.

        Args:
            unfinished: (batch,), bool. The next pass of a row that is not among them writes to the slot after its last
                token again, so that the row never becomes longer than the slots.
        """
        self.positions = self._lengths[:, None]
        self._lengths = self._lengths + unfinished
        self._used = min(self._used + 1, self._slots)
        if not self._alike:
            hidden = torch.arange(self._used, device=self._keys.device) > self.positions
            mask = torch.zeros(hidden.shape, dtype=self._keys.dtype, device=hidden.device)
            self._mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps the keys and values of a decoder layer's new tokens, and returns their attention.

        Args:
            layer: Number of the decoder layer.
            q: (batch, heads, length, head_dim), rotated, as is k. The length is 1 except for the prompts.
            k: (batch, key and value heads, length, head_dim).
            v: Likewise.

        Returns:
            A tensor of q's shape.
        """
        keys, values = self._keys[layer], self._values[layer]
        batch, heads, length, head_dim = q.shape
        if self.positions is None:
            keys[:, :, :length], values[:, :, :length] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != k.shape[1])
        keys[self._rows, :, self.positions[:, 0]] = k[:, :, 0]
        values[self._rows, :, self.positions[:, 0]] = v[:, :, 0]
        # The query heads of a group attend like several queries of one head, so that no key or value is repeated.
        queries = q.reshape(batch, k.shape[1], -1, head_dim)
        known, known_values = keys[:, :, : self._used], values[:, :, : self._used]
        out = F.scaled_dot_product_attention(queries, known, known_values, attn_mask=self._mask)
        return out.reshape(batch, heads, 1, head_dim)
