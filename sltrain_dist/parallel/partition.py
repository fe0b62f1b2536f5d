"""Which parameters are sharded and which are whole on every rank (no torch)."""

from __future__ import annotations

import re

_REPLACED = re.compile(r"\.(self_attn|mlp)\.[a-z]+_proj\.")


def is_factor(name: str) -> bool:
    """Whether a parameter belongs to a linear layer that SLTrain replaces, whatever the method.

    B, A, V or a dense weight of attention and MLP; the rest (embedding, head, norms) is the dense
    remainder, which `parallel.shard: factors` keeps whole on every rank.
    """
    return _REPLACED.search(name) is not None
