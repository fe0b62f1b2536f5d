#!/usr/bin/env python
"""Peak memory of real training steps, by configuration and category.

    python tools/bench_memory.py --preset 7b --fake           # on fake tensors: nothing is allocated, any size
    python tools/bench_memory.py --preset 60m --device cuda   # from CUDA's allocator

The model, its engine (one process) and optimizer are those that train; what is measured is an update beside whose
forward and backward pass the optimizer's states are there. On the CPU and on fake tensors the
peak is that of the bytes of live tensor storages, as a dispatch mode sees them come and go: scratch memory inside of
kernels, the allocator's rounding and the device's context are not in it. Fake tensors take the CPU's operators.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from benchmarking import table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.models.build import build_meta_model, build_model
from sltrain_dist.optim import low_bit
from sltrain_dist.optim.state_layout import Span
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.parallel.environment import Environment
from sltrain_dist.train.build import build_engine


@dataclass
class Peak:
    """The most bytes that were live at a time, and what they were."""

    total: int
    parameters: int
    gradients: int
    states: int

    @property
    def other(self) -> int:
        """Supports, activations and temporaries."""
        return self.total - self.parameters - self.gradients - self.states


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensor storages that come through the dispatcher, until they are freed.

    Attributes:
        live: Bytes now.
        peak: The most so far.
        look: What to call at every new peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.look: Callable[[], None] | None = None
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Counts storages that exist already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self.live += size
                weakref.finalize(storage, self._free, size)
        self.reach(self.live)

    def reach(self, live: int) -> None:
        """Takes note that so many bytes are live."""
        if live > self.peak:
            self.peak = live
            if self.look is not None:
                self.look()

    def most_of(self, action: Callable[[], None]) -> int:
        """The most bytes that are live during an action, beyond those before it."""
        before, peak, look = self.live, self.peak, self.look
        self.peak, self.look = before, None
        action()
        most = self.peak - before
        self.peak, self.look = peak, look
        self.reach(before + most)
        return most

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])
        return out


def one_update(engine: DDPEngine, config: Config, ids: Tensor) -> None:
    """Forward, backward and update on one full batch."""
    engine.begin_update(config.optim.lr, 1.0)
    engine.micro_step(ids, ids, 1.0 / ids.numel(), last=True)
    engine.update()


def make_states(engine: DDPEngine, config: Config) -> None:
    """What a first update leaves, without its forward and backward pass: gradients are zeros."""
    for parameter in engine.module.parameters():
        parameter.grad = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    engine._replicas.update(config.optim.lr)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _one_of_each(tracker: LiveBytes) -> AbstractContextManager[Any]:
    """Lets low-bit optimizers update one span of each shape: the others leave nothing behind and take as much.

    For fake tensors, which have no values to update. Nine tenths of all operators are those of the spans.
    """
    update, known = low_bit.LowBitAdam._update, {}

    def update_once(self: Any, parameter: Tensor, state: Any, span: Span, group: Any, maxima: Any) -> None:
        kind = (type(parameter), parameter.shape, span.rows, span.stop - span.start)
        if kind in known:
            tracker.reach(tracker.live + known[kind])
        else:
            known[kind] = tracker.most_of(lambda: update(self, parameter, state, span, group, maxima))

    return mock.patch.object(low_bit.LowBitAdam, "_update", update_once)


def live_peak(config: Config, *, fake: bool) -> Peak:
    """Peak of live bytes in an update beside states that are there."""
    with ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode())
            # Real ones are shared by all optimizers, too.
            stack.enter_context(mock.patch.object(low_bit, "quantizer", cache(low_bit.quantizer)))
            # As much at a time as on a GPU, which is what fake tensors stand for here.
            stack.enter_context(mock.patch.object(low_bit, "_SPAN_CPU", low_bit._SPAN))
        engine, ids = build(config, "cpu", fake=fake)
        with _one_of_each(LiveBytes()) if fake else nullcontext():
            make_states(engine, config)
        held = engine.tensors()
        peak = Peak(0, bytes_of(held["parameters"]), 0, bytes_of(held["states"]))

        def look() -> None:
            peak.gradients = bytes_of([p.grad for p in engine.module.parameters() if p.grad is not None])

        tracker = LiveBytes()
        tracker.add([tensor for kind in held.values() for tensor in kind])
        tracker.add(list(engine.module.buffers()))
        tracker.add([ids])
        del held  # a gradient that it named would stay alive
        tracker.look = look
        with tracker, _one_of_each(tracker) if fake else nullcontext():
            one_update(engine, config, ids)
    peak.total = tracker.peak
    return peak


def build(config: Config, device: str, *, fake: bool) -> tuple[DDPEngine, Tensor]:
    """The engine, and a batch of token ids."""
    if fake:
        model = build_meta_model(config)
        for module in model.modules():  # not to_empty, which cannot swap fake parameters
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device=device)))
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
        model.tie()
    else:
        model = build_model(config, device)
    env = Environment(0, 1, 0, torch.device(device))
    engine = build_engine(model, config, env)
    assert isinstance(engine, DDPEngine)
    shape = (config.train.micro_batch, config.data.seq_len)
    return engine, torch.zeros(shape, dtype=torch.int64, device=device)


def cuda_peak(config: Config) -> Peak:
    """Peak of the CUDA allocator in the second update; categories as they are before it."""
    engine, ids = build(config, "cuda", fake=False)
    one_update(engine, config, ids)
    torch.cuda.reset_peak_memory_stats()
    one_update(engine, config, ids)
    held = engine.tensors()
    peak = torch.cuda.max_memory_allocated()
    return Peak(peak, *(bytes_of(held[kind]) for kind in ("parameters", "gradients", "states")))


def configurations(args: argparse.Namespace) -> Iterator[tuple[str, Config]]:
    """The rows of the table."""

    def row(name: str, reparam: dict[str, Any], bits: int, update: str, **train: Any) -> tuple[str, Config]:
        values = {
            "preset": f"llama_{args.preset}",
            "reparam": reparam,
            "data": {"seq_len": args.seq_len},
            "optim": {"state_bits": bits, "update": update},
            "parallel": {"engine": "ddp"},
            "train": {"micro_batch": args.batch, "global_batch": args.batch, "dtype": args.dtype, **train},
        }
        return name, build_config(values)

    yield row("full rank, 16-bit, whole", {"method": "full"}, 16, "whole")
    yield row("full rank, 8-bit, per_layer", {"method": "full"}, 8, "per_layer")
    for support in args.supports.split(","):
        reparam = {"method": "sltrain", "support": support}
        for bits in (16, 8, 4):
            for update in ("whole", "per_layer"):
                yield row(f"{support}, {bits}-bit, {update}", reparam, bits, update)
        for bits in (8, 4):
            name = f"{support}, {bits}-bit, per_layer, checkpointing"
            yield row(name, reparam, bits, "per_layer", activation_checkpointing="full")
        name = f"{support}, 4-bit, per_layer, checkpointing, int8 weights"
        yield row(name, {**reparam, "weight_bits": 8}, 4, "per_layer", activation_checkpointing="full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="60m", help="60m, 130m, 350m, 1b or 7b")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--fake", action="store_true", help="fake tensors: shapes and types only")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32", "mixed"))
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--supports", default="random,stratified,blocks", help="by comma")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.fake and args.device == "cuda":
        parser.error("--fake needs no device; leave --device out")
    rows = []
    for name, config in configurations(args):
        peak = cuda_peak(config) if args.device == "cuda" else live_peak(config, fake=args.fake)
        rows.append({"configuration": name, "peak_bytes": peak.total, "other_bytes": peak.other, **parts(peak)})
    method = "CUDA allocator" if args.device == "cuda" else f"live storages, {'fake' if args.fake else 'real'} tensors"
    if args.json:
        shape = {"preset": args.preset, "batch": args.batch, "seq_len": args.seq_len, "dtype": args.dtype}
        print(json.dumps({**shape, "method": method, "torch": torch.__version__, "rows": rows}, indent=1))
        return
    print(f"{args.preset}, batch {args.batch} × {args.seq_len}, {args.dtype}; GB at the peak, {method}\n")
    header = ["", "peak", "parameters", "gradients", "states", "other"]
    keys = ("peak_bytes", "parameters_bytes", "gradients_bytes", "states_bytes", "other_bytes")
    print(table(header, [[str(row["configuration"]), *(f"{row[key] / 1e9:.2f}" for key in keys)] for row in rows]))


def parts(peak: Peak) -> dict[str, int]:
    """What an engine's tensors take of a peak."""
    return {f"{kind}_bytes": getattr(peak, kind) for kind in ("parameters", "gradients", "states")}


if __name__ == "__main__":
    main()
