#!/usr/bin/env python
"""Measures generation: memory and tokens/s of dense, factored and merged models of the same preset, side by side.

    python tools/bench_decode.py --preset 1b --layers 2 --dtype bf16 --batch 1

dense is the full-rank model. factored keeps B, A and V; merged has computed W = scale·BA + S once. Weights are random.
A prefill reads the prompts; a decoding step reads one token of each prompt. Times are medians of repetitions that take
turns, and ratios are to dense in the same run. Tokens/s are those of the measured number of decoder layers, with
embedding and head.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarking import (
    Run,
    add_measuring_options,
    conditions,
    median_times,
    peak_bytes,
    positive,
    sizes,
    some_of,
    table,
)
from torch import nn

from sltrain_dist.config.load import build_config
from sltrain_dist.inference.load_model import set_form
from sltrain_dist.models.build import build_model, sparse_layers
from sltrain_dist.models.kv_cache import KVCache
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.runtime.malloc import keep_freed_memory
from sltrain_dist.streams import replace_unprintable

METHODS = {
    "dense": ("full", "merged"),
    **{f"{support} {form}": (support, form) for support in ("random", "stratified", "blocks")
       for form in ("factored", "merged")},
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A model with its prompts read, and what is timed of it."""

    model: LlamaForCausalLM
    cache: KVCache
    prefill: Run
    decode: Run

    def weights_bytes(self, num_layers: int) -> int:
        """Returns the bytes of weights and positions, in a model of this many layers like those that are there."""
        layers = _bytes(self.model.model.layers)
        return _bytes(self.model) - layers + layers * num_layers // len(self.model.model.layers)


def _bytes(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())  # some buffers are views of parameters
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def make(method: str, args: argparse.Namespace) -> Measured:
    """Builds a model, reads its prompts, and returns what is to be timed."""
    kind, form = METHODS[method]
    slots = args.prompt_tokens + args.new_tokens * (args.repeats + 2)  # with a warm-up, and a repetition for the peak
    config = build_config(
        {
            "preset": f"llama_{args.preset}",
            "model": {"num_layers": args.layers},
            "reparam": {"method": "full"} if kind == "full" else {"support": kind},
            "data": {"seq_len": slots},
            "train": {"dtype": args.dtype},
        }
    )
    model = build_model(config, args.device).requires_grad_(False)
    for _, layer in sparse_layers(model):
        nn.init.normal_(layer.B, std=0.02)  # it starts at 0
    set_form(model, form)
    dtype, vocabulary = getattr(torch, config.train.precision.parameter), config.model.vocab_size
    lengths = [args.prompt_tokens] * args.batch
    ids = torch.randint(vocabulary, (args.batch, args.prompt_tokens), device=args.device)
    last, first = torch.full((args.batch,), args.prompt_tokens - 1, device=args.device), torch.zeros_like(ids[:, 0])

    def read_prompts() -> KVCache:
        cache = KVCache(config.model, lengths, slots, dtype, args.device)
        model(ids, at=last, cache=cache)
        return cache

    cache = read_prompts()
    growing = torch.ones(args.batch, dtype=torch.bool, device=args.device)

    def decode() -> None:  # every repetition goes on where the one before ended
        token = ids[:, -1]
        for _ in range(args.new_tokens):
            cache.advance(growing)
            token = model(token[:, None], at=first, cache=cache).argmax(-1)

    return Measured(model, cache, read_prompts, decode)


def measure(methods: list[str], args: argparse.Namespace, num_layers: int) -> list[dict[str, Any]]:
    """Returns memory and speed of all methods."""
    device = torch.device(args.device)
    made = {method: make(method, args) for method in methods}

    def seconds(part: Callable[[Measured], Run]) -> dict[str, float]:
        runs = {method: part(measured) for method, measured in made.items()}
        return median_times(runs, args.repeats, device, cpu_time=args.cpu_time)

    prefill, decode = seconds(lambda measured: measured.prefill), seconds(lambda measured: measured.decode)
    return [
        {
            "method": method,
            "weights_bytes": measured.weights_bytes(args.layers),
            "all_weights_bytes": measured.weights_bytes(num_layers),
            "cache_bytes": measured.cache.num_bytes,
            "prefill_tokens_per_s": args.batch * args.prompt_tokens / prefill[method],
            "prefill_speedup": prefill["dense"] / prefill[method],
            "decode_tokens_per_s": args.batch * args.new_tokens / decode[method],
            "decode_speedup": decode["dense"] / decode[method],
            "decode_peak_bytes": peak_bytes(measured.decode, device),
        }
        for method, measured in made.items()
    ]


def main() -> None:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b", choices=sizes())
    parser.add_argument("--layers", type=positive, default=2, help="decoder layers that are measured")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=positive, default=1, help="prompts that are continued together")
    parser.add_argument("--prompt-tokens", type=positive, default=128)
    parser.add_argument("--new-tokens", type=positive, default=16, help="decoding steps in a repetition")
    usual = "random factored,random merged,blocks factored"
    parser.add_argument("--methods", type=some_of(METHODS), default=usual, help="comma-separated, in addition to dense")
    parser.add_argument("--repeats", type=positive, default=5)
    add_measuring_options(parser)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
    num_layers = build_config({"preset": f"llama_{args.preset}"}).model.num_layers
    with torch.inference_mode():
        rows = measure(list(dict.fromkeys(["dense", *args.methods])), args, num_layers)
    report = {
        "preset": args.preset, "layers": args.layers, "all_layers": num_layers, "dtype": args.dtype,
        "batch": args.batch, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens,
        **conditions(args.device, cpu_time=args.cpu_time), "methods": rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print(
        f"{args.preset}, {args.layers} of {num_layers} layers, {args.dtype}, "
        f"{args.batch} × {args.prompt_tokens} tokens, {report['device']}\n"
    )
    cells = [
        [
            row["method"],
            f"{row['weights_bytes'] / 1e6:.1f}",
            f"{row['all_weights_bytes'] / 1e9:.3f}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            f"{row['decode_peak_bytes'] / 1e6:.1f}",
            f"{row['prefill_tokens_per_s']:.0f} ({row['prefill_speedup']:.2f})",
            f"{row['decode_tokens_per_s']:.1f} ({row['decode_speedup']:.2f})",
        ]
        for row in rows
    ]
    header = ["method", "weights MB", f"of {num_layers} layers GB", "cache MB", "peak beyond both MB"]
    print(table([*header, "prefill tokens/s (× dense)", "decode tokens/s (× dense)"], cells))


if __name__ == "__main__":
    main()
