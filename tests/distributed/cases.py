"""Engine cases that every number of ranks trains alike, and the training that they share.

Run under torchrun as a script, this trains all cases that need its number of ranks, one after another in
the same processes, and writes what it saw to the file that it is given.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.models.build import build_model
from sltrain_dist.numerics.splitmix import integers
from sltrain_dist.parallel import environment
from sltrain_dist.parallel.engine import Replicated
from sltrain_dist.parallel.environment import Environment
from sltrain_dist.train.build import build_engine
from sltrain_dist.train.step import Rows, forward_backward

UPDATES = 10
GLOBAL_BATCH = 12


@dataclass(frozen=True)
class Case:
    """One way to train; `key` says with which single-process training it must agree."""

    engine: str
    zero_stage: int
    shard: str
    micro_batch: int
    clip: float
    optimizer: str = "adamw"
    method: str = "sltrain"
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    @property
    def reference(self) -> Case:
        return Case("ddp", 2, "factors", GLOBAL_BATCH, self.clip, self.optimizer, self.method, self.dtype)


CASES = (
    Case("ddp", 2, "factors", 6, 0.0),
    Case("ddp", 2, "factors", 2, 0.5),
    Case("ddp", 2, "factors", 2, 0.0, "sgd"),
    Case("zero", 1, "factors", 6, 0.5),
    Case("zero", 1, "factors", 2, 0.5, "sgd"),
    Case("zero", 1, "all", 2, 0.5),
    Case("zero", 2, "factors", 2, 0.5),
    Case("zero", 2, "factors", 6, 0.0),
    Case("zero", 2, "factors", 2, 0.0, "sgd"),
    Case("zero", 2, "all", 6, 0.5),
    Case("zero", 2, "all", 2, 0.0, "sgd"),
    Case("zero", 2, "factors", 2, 0.5, "adamw", "full"),
    Case("ddp", 2, "factors", 2, 0.5, "adamw", "lowrank"),
    Case("zero", 2, "factors", 2, 0.5, "adamw", "sltrain", "bf16"),
    Case("zero", 1, "all", 2, 0.5, "adamw", "sltrain", "bf16"),
)


BROKEN = Case("zero", 2, "factors", 2, 0.5)
"""Trained once more with the remainder's all-reduce left out."""


def config_of(case: Case) -> Config:
    return build_config(
        {
            "model": {
                "vocab_size": 61,
                "hidden_size": 32,
                "intermediate_size": 44,
                "num_layers": 2,
                "num_heads": 4,
                "init_std": 0.2,
            },
            "reparam": {"method": case.method, "rank": 6, "density": 0.1, "alpha": 12.0},
            "data": {"seq_len": 16},
            "optim": {"name": case.optimizer, "lr": 0.3 if case.optimizer == "sgd" else 0.004, "clip": case.clip},
            "parallel": {"engine": case.engine, "zero_stage": case.zero_stage, "shard": case.shard},
            "train": {
                "steps": UPDATES,
                "micro_batch": case.micro_batch,
                "global_batch": GLOBAL_BATCH,
                "dtype": case.dtype,
            },
        }
    )


def global_rows(update: int) -> Rows:
    """A global batch with documents of very different lengths, so that means over rows or ranks are wrong."""
    ids = integers(99, update * 10_000, GLOBAL_BATCH * 17, 61).astype(np.int32).reshape(GLOBAL_BATCH, 17)
    for row in range(GLOBAL_BATCH):
        ids[row, 2 + row * 14 // (GLOBAL_BATCH - 1) :] = -1
    return ids


def train(case: Case, env: Environment) -> dict[str, Any]:
    """Trains a case; returns losses, gradient norms, this rank's final weights, and whether all ranks' are equal."""
    config = config_of(case)
    engine = build_engine(build_model(config, env.device), config, env)
    share = GLOBAL_BATCH // env.world_size
    losses, norms = [], []
    for update in range(UPDATES):
        rows = global_rows(update)[env.rank * share : (env.rank + 1) * share]
        loss, _ = forward_backward(engine, rows, case.micro_batch, env)
        norms.append(engine.clip_gradients(case.clip))
        losses.append(loss)
        engine.update(config.optim.lr)
    weights = {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
    digests = env.gather({name: float(w.double().sum()) for name, w in weights.items()})
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "replicas_equal": all(digest == digests[0] for digest in digests),
    }


def main(out: str) -> None:
    torch.set_num_threads(1)
    env = environment.start(60, need_group=True)
    fits = [case for case in CASES if GLOBAL_BATCH % (case.micro_batch * env.world_size) == 0]
    results = {case.name: train(case, env) for case in fits}
    with mock.patch.object(Replicated, "all_reduce", lambda self: None):
        results["skipped reduction"] = train(BROKEN, env)
    if env.is_main:
        torch.save(results, out)
    environment.stop()


if __name__ == "__main__":
    main(sys.argv[1])
