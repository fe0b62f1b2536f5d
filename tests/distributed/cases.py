"""Engine cases that every number of ranks trains alike, and the training that they share.

On several ranks, :func:`main` trains all cases that this number of ranks can, one after another in the same processes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch

from sltrain_dist.config.load import build_config
from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import PROJECTED_METHODS, Config, SupportKind
from sltrain_dist.data.stream.rows import mark_first_tokens
from sltrain_dist.errors import ConfigError
from sltrain_dist.models.build import build_model
from sltrain_dist.numerics.int8_weight import parts_of
from sltrain_dist.numerics.splitmix import integers
from sltrain_dist.optim.restarts import restart_is_due
from sltrain_dist.parallel import engine as engines
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.per_layer import InBackward
from sltrain_dist.parallel.pieces import Replicated
from sltrain_dist.parallel.traffic import TrafficMeter
from sltrain_dist.parallel.whole_layers import restart
from sltrain_dist.runtime import environment
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.train.build import start_engine
from sltrain_dist.train.step import Rows, forward_backward, to_batch
from tests.support.configs import TRAINED

UPDATES, BF16_UPDATES = 3, 10
GLOBAL_BATCH = 12
RANKS = (1, 2, 4)


@dataclass(frozen=True)
class Case:
    """One way to train. The first fields are what parity must not depend on, the others what is trained."""

    engine: str = "ddp"
    shard: str = "factors"
    accumulation: int = 1
    accumulate: str = "auto"
    checkpointing: str = "none"
    replicas: int = 1
    reshard: bool = True
    offload: bool = False
    compiled: bool = False
    chunk: int = 0
    weights: str = "random"
    tied: bool = False
    clip: float = 0.0
    optimizer: str = "adamw"
    dtype: str = "fp32"
    update: str = "whole"
    clip_mode: str = "previous_norm"
    bits: int = 16
    packed: bool = False
    """Whether rows hold several documents, which do not see each other."""
    weight_bits: int = 16
    dense_layers: tuple[int, ...] = ()
    restart: int = 0
    """Updates between restarts."""
    cleared: str = "all"
    """Parameters whose states a restart clears."""
    factors: str = "adam"
    """The optimizer of matrices; Newton–Schulz in fp32."""

    @property
    def name(self) -> str:
        """What differs from the plainest case."""
        chosen = (f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)
        return ",".join(chosen) or "plain"

    @property
    def updates(self) -> int:
        """How many are made. The low-rank B begins at 0, and bf16 rounds it coarsely until it has grown. There are two
        restarts (in bf16 one), and two updates after the last."""
        if self.dtype == "bf16":
            return BF16_UPDATES
        if self.weights in PROJECTED_METHODS:
            return 4  # with new projections in the first and the third, but not in the last, whose traffic is measured
        return 2 * self.restart + 2 if self.restart else UPDATES

    @property
    def reference(self) -> Case:
        """The single-process training that it must agree with."""
        same = {"weights", "tied", "clip", "optimizer", "dtype", "bits", "packed", "weight_bits", "dense_layers"}
        same |= {"restart", "cleared", "factors"}
        if self.update == "per_layer" and self.clip > 0 and self.clip_mode != "two_pass":
            same |= {"update", "clip_mode"}  # which clip by another norm than this update's
        return Case(**{name: value for name, value in asdict(self).items() if name in same})


VALUES: dict[str, tuple[Any, ...]] = {
    "engine": ("ddp", "fsdp", "zero1", "zero2", "zero3"),
    "shard": ("factors", "all"),
    "accumulation": (1, 3),
    "accumulate": ("local", "sharded"),
    "checkpointing": ("none", "full", "blocks", "attention"),
    "chunk": (0, 5),
    "weights": ("random", "stratified", "blocks", "full", "lowrank"),
    "clip": (0.0, 0.05),
    "optimizer": ("adamw", "sgd"),
    "update": ("whole", "per_layer"),
}
"""Every pair of these values is in some case, where it can be run."""

BY_HAND = (
    Case("fsdp", accumulation=3, accumulate="local", reshard=False),
    Case("fsdp", accumulation=3, replicas=2, clip=0.05),
    Case("fsdp", shard="all", accumulation=3, accumulate="local", replicas=2),
    Case("fsdp", offload=True, clip=0.05),
    Case("zero1", accumulation=3, offload=True, clip=0.05),
    Case("zero2", shard="all", accumulation=3, offload=True),
    Case("zero3", accumulation=3, offload=True, clip=0.05),
    Case("fsdp", shard="all", tied=True, chunk=5),
    Case("zero2", tied=True, chunk=5),
    Case("zero3", shard="all", tied=True, chunk=5),
    Case("zero3", tied=True),
    Case("zero3", weights="blocks", compiled=True, chunk=5),
    *(
        Case(engine, dtype="bf16", clip=0.05, accumulation=3, chunk=5)
        for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3")
    ),
    *(Case(engine, dtype="mixed", shard="all", chunk=5) for engine in ("ddp", "fsdp", "zero2", "zero3")),
    Case("fsdp", dtype="mixed", checkpointing="ops"),
    Case("zero1", weights="full", checkpointing="ops"),
    Case("zero2", weights="blocks", checkpointing="ops"),
    *(Case(engine, update="per_layer", clip=0.05, clip_mode="two_pass") for engine in ("ddp", "fsdp")),
    *(Case(engine, update="per_layer", clip=0.05, clip_mode="per_parameter") for engine in ("ddp", "fsdp")),
    Case("fsdp", update="per_layer", clip=0.05, accumulation=3, replicas=2),
    Case("fsdp", update="per_layer", clip=0.05, clip_mode="per_parameter", replicas=2, optimizer="sgd"),
    Case("fsdp", update="per_layer", shard="all", tied=True, accumulation=3),
    Case("ddp", update="per_layer", tied=True, checkpointing="ops"),
    Case("ddp", packed=True, update="per_layer"),
    Case("fsdp", packed=True, accumulation=3, checkpointing="attention"),
    Case("zero3", packed=True, checkpointing="ops"),
    Case("fsdp", update="per_layer", checkpointing="ops", compiled=True),
    *(Case(engine, update="per_layer", dtype="bf16", clip=0.05, accumulation=3) for engine in ("ddp", "fsdp")),
    *(Case(engine, update="per_layer", dtype="mixed") for engine in ("ddp", "fsdp")),
    *(Case(engine, optimizer="adam") for engine in ("ddp", "fsdp", "zero2")),
    Case("ddp", optimizer="adafactor"),
    *(Case(engine, bits=bits) for engine in ("ddp", "fsdp") for bits in (8, 4)),
    Case("fsdp", shard="all", accumulation=3, bits=4, replicas=2),
    Case("fsdp", offload=True, dtype="bf16", bits=8),
    Case("fsdp", dtype="bf16", bits=32),
    *(Case(engine, bits=bits, update="per_layer") for engine, bits in (("ddp", 8), ("fsdp", 4))),
    Case("ddp", bits=8, weight_bits=8, accumulation=3, chunk=5, clip=0.05),
    Case("ddp", bits=4, weight_bits=8, weights="blocks", update="per_layer", checkpointing="full"),
    Case("ddp", bits=8, weight_bits=8, dense_layers=(0,)),
    Case("fsdp", dense_layers=(0,), update="per_layer", accumulation=3, checkpointing="blocks"),
    Case("zero2", dense_layers=(0,), accumulation=3, clip=0.05),
    Case("zero3", dense_layers=(0,), shard="all", weights="lowrank"),
    *(Case(engine, restart=2) for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
    *(Case(engine, restart=2, cleared="factors", clip=0.05, accumulation=3) for engine in ("ddp", "fsdp")),
    Case("fsdp", restart=2, reshard=False, weights="blocks", update="per_layer", clip=0.05),
    Case("fsdp", restart=2, shard="all", replicas=2, weights="lowrank", accumulation=3),
    Case("fsdp", restart=2, offload=True, optimizer="adam", dense_layers=(0,)),
    Case("zero1", restart=2, accumulation=3, shard="all", clip=0.05),
    Case("zero2", restart=2, offload=True, dense_layers=(0,)),
    Case("zero3", restart=2, shard="all", weights="lowrank", accumulation=3, offload=True),
    *(Case(engine, restart=6, dtype="bf16", accumulation=3, clip=0.05) for engine in ("ddp", "fsdp", "zero2", "zero3")),
    Case("fsdp", restart=2, dtype="mixed", shard="all"),
    *(Case(engine, restart=2, bits=bits, update="per_layer") for engine, bits in (("ddp", 8), ("fsdp", 4))),
    Case("ddp", restart=2, bits=8, weight_bits=8, accumulation=3),
    Case("ddp", restart=2, optimizer="adafactor"),
    *(Case(engine, weights="cola", clip=0.05, accumulation=3) for engine in ("ddp", "fsdp", "zero2", "zero3")),
    Case("fsdp", weights="cola", checkpointing="ops", dense_layers=(0,), update="per_layer"),
    *(Case("ddp", weights=method, clip=0.05, accumulation=3) for method in PROJECTED_METHODS),
    Case("ddp", weights="galore", update="per_layer", bits=8),
    Case("ddp", weights="relora", restart=2, clip=0.05, accumulation=3),
    Case("ddp", weights="relora", restart=2, cleared="factors", update="per_layer"),
    Case("ddp", factors="muon", accumulation=3, clip=0.05),
    Case("ddp", factors="spectron", dense_layers=(0,)),
    Case("fsdp", factors="muon", dense_layers=(0,), accumulation=3, clip=0.05),
    Case("fsdp", factors="muon", weights="full", shard="all", tied=True),
    Case("fsdp", factors="muon", bits=8, offload=True),
    Case("fsdp", factors="spectron", weights="lowrank", accumulation=3, replicas=2),
    Case("fsdp", factors="spectron", restart=2, cleared="factors"),
    *(Case(engine, factors="muon", dtype="bf16", accumulation=3, chunk=5) for engine in ("ddp", "fsdp")),
    Case("fsdp", factors="spectron", dtype="mixed"),
    Case("zero1", factors="muon", accumulation=3, clip=0.05),
    Case("zero2", factors="spectron", dense_layers=(0,), shard="all"),
    Case("zero2", factors="muon", weights="full", offload=True),
    Case("zero3", factors="muon", weights="full", shard="all", clip=0.05),
    Case("zero3", factors="spectron", restart=2, accumulation=3),
    Case("zero3", factors="muon", dtype="bf16", accumulation=3, chunk=5),
)
"""What pairs do not cover."""

PER_LAYER = tuple(
    Case(engine, shard=shard, accumulation=accumulation, update="per_layer")
    for engine, shard in (("ddp", "factors"), ("fsdp", "factors"), ("fsdp", "all"))
    for accumulation in (1, 3)
)
"""Per-layer updates that are compared with whole ones of the same engine, which are trained beside them."""

BROKEN = Case("zero2", accumulation=3, clip=0.05, optimizer="sgd")  # AdamW is blind to the scale of gradients
"""Trained twice more, each time with a step left out or made twice."""

EAGER = Case("fsdp", accumulation=3, update="per_layer")
"""Trained once more, with an update at every micro-batch, as the reference code makes it."""


def config_of(case: Case, ranks: int = 1) -> Config:
    """The case's configuration; a ConfigError where there is no such combination."""
    reparam: dict[str, Any] = {"method": "sltrain", "support": case.weights, "rank": 6, "density": 0.1, "alpha": 12.0}
    reparam |= {"weight_bits": case.weight_bits, "dense_layers": case.dense_layers}
    reparam |= {"restart_every": case.restart, "restart_states": case.cleared}
    if case.weights not in get_args(SupportKind):
        reparam |= {"method": case.weights, "support": "random"}
    recompute: dict[str, Any] = {"activation_checkpointing": case.checkpointing}
    if case.checkpointing in ("blocks", "attention", "ops"):
        recompute = {"activation_checkpointing": "selective", "checkpoint_policy": case.checkpointing}
    zero = case.engine.startswith("zero")
    return build_config(
        {
            "model": {
                **TRAINED,
                "init_std": 0.2,
                "tie_head": case.tied,
            },
            "reparam": reparam,
            "data": {"seq_len": 16, **({"batching": "pack", "reset_attention": True} if case.packed else {})},
            "optim": {
                "name": case.optimizer,
                "lr": 0.3 if case.optimizer == "sgd" else 0.004,
                "clip": case.clip,
                "update": case.update,
                "clip_mode": case.clip_mode,
                "state_bits": case.bits,
                "projection_every": 2,
                "factors": case.factors,
                "newton_schulz": "fp32" if case.factors != "adam" else "bf16",
            },
            "parallel": {
                "engine": "zero" if zero else case.engine,
                "zero_stage": int(case.engine[-1]) if zero else 2,
                "shard": case.shard,
                "accumulate": case.accumulate,
                "replicas": case.replicas,
                "reshard_after_forward": case.reshard,
                "cpu_offload": case.offload,
            },
            "train": {
                "steps": case.updates,
                "micro_batch": GLOBAL_BATCH // (ranks * case.accumulation),
                "global_batch": GLOBAL_BATCH,
                "dtype": case.dtype,
                "compile": case.compiled,
                "loss_chunk_tokens": case.chunk,
                **recompute,
            },
        }
    )


def runs(case: Case, ranks: int) -> bool:
    """Whether there is such a combination of settings, for this number of ranks."""
    try:
        micro_batches_per_update(config_of(case, ranks), ranks)
    except ConfigError:
        return False
    return case.replicas == 1 or ranks // case.replicas > 1


def covering(parts: Mapping[Case, set[Any]]) -> list[Case]:
    """Cases that together have every part that any case has; greedy, always the same."""
    left, missing, chosen = dict(parts), set().union(*parts.values()), []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left.pop(best)
        chosen.append(best)
    return chosen


def cases_on(ranks: int) -> list[Case]:
    """The cases that a number of ranks trains: all on two. On one, where engines have little to do, and on four, cases
    in which every value of every field comes (but compiling, which takes long), and every engine with either `shard`;
    and those that two cannot run."""
    possible = [case for case in CASES if runs(case, ranks)]
    if ranks == 2:
        return possible
    quick = [case for case in possible if not case.compiled]
    few = covering({case: {*asdict(case).items(), (case.engine, case.shard)} for case in quick})
    return [case for case in possible if case in few or case == EAGER or case.replicas > 1]


def pairwise() -> list[Case]:
    """Cases in which every pair of :data:`VALUES` comes at least once, if it can be run."""
    every = [dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())]
    legal = functools.cache(lambda engine, waits, update: runs(Case(engine, accumulate=waits, update=update), 1))
    possible = [values for values in every if legal(values["engine"], values["accumulate"], values["update"])]
    return covering(
        {Case(**values): set(itertools.combinations(sorted(values.items(), key=str), 2)) for values in possible}
    )


WHOLE = {case: replace(case, update="whole") for case in PER_LAYER}
CASES = tuple(dict.fromkeys((*pairwise(), *BY_HAND, EAGER, *PER_LAYER, *WHOLE.values())))


def global_rows(update: int, packed: bool = False) -> Rows:
    """A global batch with documents of very different lengths, so that means over rows or ranks are wrong."""
    ids = integers(99, update * 10_000, GLOBAL_BATCH * 17, 61).astype(np.int32).reshape(GLOBAL_BATCH, 17)
    for row in range(GLOBAL_BATCH):
        length = 2 + row * 14 // (GLOBAL_BATCH - 1)
        ids[row, length:] = -1
        if packed:
            mark_first_tokens(ids, np.s_[row, 3 : length : 2 + row % 5])
    return ids


def held_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of the memory behind an engine's tensors, by kind."""
    held = {}
    for kind, tensors in engine.tensors().items():
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        held[kind] = sum(storages.values())
    return held


def whole_tensors(engine: Engine, env: Environment) -> dict[str, torch.Tensor]:
    """All parameters and optimizer states, put together from the pieces that the ranks would save."""
    mine = [(part.name, part.shape, part.start, values.clone()) for part, values in engine.saved_ranges()]
    tensors: dict[str, torch.Tensor] = {}
    covered: dict[str, int] = {}
    for name, shape, start, data in itertools.chain.from_iterable(env.gather(mine)):
        whole = tensors.setdefault(name, torch.empty(shape, dtype=data.dtype))
        whole.view(-1)[start : start + data.numel()] = data
        covered[name] = covered.get(name, 0) + data.numel()
    assert all(covered[name] == whole.numel() for name, whole in tensors.items())
    return tensors


def whole_weights(engine: Engine, env: Environment) -> dict[str, torch.Tensor]:
    """All parameters, in float32."""
    return {name: t.float() for name, t in whole_tensors(engine, env).items() if name.startswith("model.")}


def first_weights(config: Config) -> dict[str, torch.Tensor]:
    """What one process starts from."""
    named = build_model(config).named_parameters()
    return {f"model.{name}{ending}": part for name, p in named for ending, part in parts_of(p).items()}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same to the bit, or that only one of both has."""
    both = found.keys() & expected.keys()
    return sorted(
        (found.keys() ^ expected.keys()) | {name for name in both if not torch.equal(found[name], expected[name])}
    )


def small_quantized() -> contextlib.AbstractContextManager[Any]:
    """Lets `optim.state_bits` quantize these small parameters."""
    return mock.patch("sltrain_dist.optim.state_layout.QUANTIZED_FROM", 100)


@small_quantized()
def train(case: Case, env: Environment) -> dict[str, Any]:
    """Trains a case; returns losses, gradient norms, final weights, whether replicas are equal, and bytes held."""
    config = config_of(case, env.world_size)
    # Without a compiler, but with its tracing: what is asked here is whether the engines survive that.
    backend = mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with backend:
        engine = start_engine(config, env)
    first = whole_tensors(engine, env)
    share = GLOBAL_BATCH // env.world_size
    losses, norms = [], []
    held: dict[str, int] = {}
    for update in range(case.updates):
        rows = global_rows(update, case.packed)[env.rank * share : (env.rank + 1) * share]
        last = update == case.updates - 1  # the one whose traffic is asked for: to follow it takes time
        if restart_is_due(config.reparam, update):
            evaluate_some(engine, config)
            restart(engine, config, env, update // config.reparam.restart_every)
        with TrafficMeter() if last else contextlib.nullcontext() as meter:
            engine.begin_update(config.optim.lr, norms[-1] if norms else None)
            reset = config.data.reset_attention
            loss, _ = forward_backward(engine, rows, config.train.micro_batch, env, reset_attention=reset)
            held = held_bytes(engine)
            norms.append(engine.clip_gradients())
            losses.append(loss)
            engine.update()
    held["states"] = held_bytes(engine)["states"]
    digests = env.gather({name: float(w.double().sum()) for name, w in engine.replicas()})
    return {
        "losses": losses,
        "norms": norms,
        "first": first,
        "weights": whole_weights(engine, env),
        "replicas_equal": all(digest == digests[0] for digest in digests),
        "held": env.gather(held),
        "sent": asdict(meter.traffic),
    }


def evaluate_some(engine: Engine, config: Config) -> None:
    """Makes an evaluation, which may leave weights gathered."""
    batch = to_batch(torch.from_numpy(global_rows(0)[:1]), reset_attention=config.data.reset_attention)
    engine.evaluate(*batch)


def norms_with_one_bad_value(case: Case, env: Environment) -> list[float]:
    """Every rank's gradient norm, where a single gradient on the last rank is infinite."""
    config = config_of(case, env.world_size)
    engine = start_engine(config, env)
    share = GLOBAL_BATCH // env.world_size
    forward_backward(engine, global_rows(0)[env.rank * share :][:share], config.train.micro_batch, env)
    if env.rank == env.world_size - 1:
        # What only this rank holds: a reduction would have spread it before.
        shards = next(g for g in engine.tensors()["gradients"] if g.numel() not in (32, 61 * 32))
        shards.view(-1)[0] = torch.inf
    return env.gather(engine.clip_gradients())


def main(out: str) -> None:
    """Writes the results of all cases, by their names, to `out`/RANKS.pt."""
    torch.set_num_threads(1)
    env = environment.start(60, need_group=True)
    results = {case.name: train(case, env) for case in cases_on(env.world_size)}
    if env.world_size > 1:
        with mock.patch.object(Replicated, "all_reduce", lambda self, scale=1.0: None):
            results["skipped reduction"] = train(BROKEN, env)

        sharding = (Case("fsdp"), Case("zero1"), Case("zero2"), Case("zero3"))
        results["one bad value"] = {case.name: norms_with_one_bad_value(case, env) for case in sharding}

        def twice(shards: Any, whole: Any, *args: Any, **kwargs: Any) -> float:
            return engines.clip_shards([*shards, *whole], whole, *args, **kwargs)

        with mock.patch("sltrain_dist.parallel.zero.clip_shards", twice):
            results["remainder counted again"] = train(BROKEN, env)

        run = InBackward.run
        with mock.patch.object(InBackward, "run", lambda self, backward, last: run(self, backward, last=True)):
            results["stepped at every micro-batch"] = train(EAGER, env)
    if env.is_main:
        torch.save(results, Path(out) / f"{env.world_size}.pt")
    env.gather(None)  # no rank is gone before all are done
    sys.stderr.flush()
    # Not through the interpreter's end: threads of a process group that are still there abort the process.
    os._exit(0)
