"""Starts every engine on several processes, and looks at what its shards hold and what starting took."""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sltrain_dist.checkpoint.initial_weights import weights_for
from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.checkpoint.store import CheckpointStore
from sltrain_dist.config.load import to_yaml
from sltrain_dist.config.schema import Config
from sltrain_dist.models.build import supports_fingerprint
from sltrain_dist.parallel import zero, zero_start
from sltrain_dist.runtime import environment
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.tracking.live_bytes import LiveBytes
from sltrain_dist.train.build import start_engine
from sltrain_dist.train.step import forward_backward
from tests.distributed.cases import (
    Case,
    config_of,
    differing,
    first_weights,
    global_rows,
    small_quantized,
    whole_tensors,
    whole_weights,
)

CASES = (
    Case("fsdp"),
    Case("fsdp", shard="all", tied=True, weights="blocks", dtype="bf16"),
    Case("fsdp", offload=True, dtype="mixed", weights="lowrank"),
    Case("fsdp", weights="stratified", bits=8, update="per_layer"),
    Case("zero3", weights="stratified"),  # the first under DeepSpeed, whose own start-up it must not depend on
    Case("zero1", weights="full"),
    Case("zero1", shard="all", tied=True, dtype="bf16"),
    Case("zero2"),
    Case("zero2", shard="all", offload=True, dtype="mixed"),
    Case("zero3", shard="all", tied=True, dtype="bf16"),
    Case("zero3", offload=True, dtype="mixed", weights="lowrank"),
    Case("ddp", weight_bits=8, bits=8, tied=True),
    Case("fsdp", factors="muon", bits=8),
    Case("zero2", factors="muon", weights="full", dtype="bf16"),
    Case("zero3", factors="spectron", shard="all"),
)


BEFORE = (Case(weights="full"), Case())
AFTER = (
    Case("fsdp"),
    Case("fsdp", weights="full", dtype="bf16", shard="all"),
    Case("zero1"),
    Case("zero2", weights="full"),
    Case("zero3", shard="all"),
    Case("zero3", weights="lowrank"),
)
"""Runs that start from the weights of other ones."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds, in memory: as much of a reader as starting needs."""

    tensors: dict[str, torch.Tensor]
    step: int

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        with _disable_current_modes():  # a file's tensors are not live
            return self.tensors[name].view(-1)[start : start + count].clone()


@small_quantized()
def start(case: Case, env: Environment) -> dict[str, Any]:
    """Starts a case from initial values, makes an update, and starts it again from what a checkpoint would hold.

    Returns:
        Which values were not those that were expected, and for each rank the most live bytes of every part;
        "partition" is the part of the start before DeepSpeed's engine, under ZeRO 3.
    """
    config = config_of(case, env.world_size)
    tracker, rows = LiveBytes(), global_rows(0)[env.rank :: env.world_size]

    def partition(*args: Any) -> Any:
        parameters = zero_start.partition_by_layer(*args)
        tracker.begin("start, partitioned")
        return parameters

    tracker.begin("start")
    with tracker, mock.patch.object(zero, "partition_by_layer", partition):
        engine = start_engine(config, env)
    started = [interval.peak for interval in tracker.intervals[1:]]
    initial = differing(whole_tensors(engine, env), first_weights(config))
    gc.collect()
    tracker.begin("update")
    with tracker:
        engine.begin_update(config.optim.lr, None)
        forward_backward(engine, rows, config.train.micro_batch, env)
        engine.clip_gradients()
        engine.update()
    saved = Saved(whole_tensors(engine, env), 1)
    del engine
    gc.collect()
    again = LiveBytes()
    with again:
        engine = start_engine(config, env, saved.read, saved.step)
    resumed = differing(whole_tensors(engine, env), saved.tensors)
    update = tracker.intervals[-1].peak
    return {
        "initial": initial,
        "resumed": resumed,
        "start": env.gather(max(started)),
        "partition": env.gather(started[0]),
        "resume": env.gather(again.peak),
        "update": env.gather(update),
    }


def initial(source: CheckpointReader, config: Config, env: Environment, directory: Path) -> dict[str, torch.Tensor]:
    """All parameters of a run that starts from a checkpoint, put together."""
    with weights_for(config, source, env, directory, lambda line: None) as read:
        return whole_weights(start_engine(config, env, read), env)


def start_from(before: Case, case: Case, env: Environment, directory: Path) -> list[str]:
    """Starts a case from the weights of another one's checkpoint.

    Returns:
        Names of parameters that are not to the bit those of one process.
    """
    config, path = config_of(before), directory / "checkpoints"
    engine = start_engine(config, env)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if name.endswith(".B"):
                parameter.fill_(0.01)  # it starts at 0, and W = S is nothing to convert
    state = {"counters": {"step": 1}, "data": {}, "rng": [], "supports": supports_fingerprint(engine.module)}
    saved = CheckpointStore(path, env, keep=1).save(1, engine.saved_ranges(), state, to_yaml(config))
    source = CheckpointReader(saved)
    config = config_of(case, env.world_size)
    found = initial(source, config, env, directory / "shared")
    if not env.is_main:
        return []
    alone = Environment(0, 1, 0, env.device)
    one_process = config_of(Case(weights=case.weights, dtype=case.dtype))
    return differing(found, initial(source, one_process, alone, directory / "alone"))


def main(out: str) -> None:
    """Writes what :func:`start` saw, by the names of the cases, to a file."""
    torch.set_num_threads(1)
    env = environment.start(60, need_group=True)
    results: dict[str, Any] = {case.name: start(case, env) for case in CASES}
    for before, after in itertools.product(BEFORE, AFTER):
        name = f"{before.name} → {after.name}"
        results[name] = start_from(before, after, env, Path(out).parent / name)
    if env.is_main:
        Path(out).write_text(json.dumps(results))
    env.gather(None)  # no rank is gone before all are done
    sys.stderr.flush()
    os._exit(0)  # see cases.py
