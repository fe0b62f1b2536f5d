"""Follows the live bytes of real training on several processes, for comparison with replays and estimates.

    PYTHONPATH=. torchrun --nproc-per-node=2 tests/distributed/live.py OUT.json [CONFIGURATIONS.json]

trains every configuration (a mapping from names to what `build_config` takes; without one, :data:`CASES`) for two
updates, and writes {name: [timeline of each rank]}, a timeline being a list of [phase, where, {component: bytes}].
The processes compute on the CPU and talk through gloo.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sltrain_dist.config.load import build_config, merged
from sltrain_dist.config.schema import Config
from sltrain_dist.plan.follow import follow
from sltrain_dist.runtime import environment
from sltrain_dist.runtime.environment import Environment
from tests.support.configs import PLANNED

Timeline = list[tuple[str, str, dict[str, int]]]
"""What JSON makes of it: phase, where, bytes by component."""


def _case(**sections: Any) -> dict[str, Any]:
    return merged(PLANNED, merged({"train": {"global_batch": 8}}, sections))


CASES: dict[str, dict[str, Any]] = {
    "ddp": _case(reparam={"restart_every": 9}, parallel={"engine": "ddp"}),
    "ddp, per layer": _case(
        parallel={"engine": "ddp"}, optim={"update": "per_layer", "clip": 1.0}, train={"global_batch": 4}
    ),
    "fsdp": _case(reparam={"restart_every": 9}, parallel={"engine": "fsdp"}, optim={"clip": 1.0}),
    "fsdp, all, local": _case(
        parallel={"engine": "fsdp", "shard": "all", "accumulate": "local", "reshard_after_forward": False},
        train={"dtype": "mixed"},
    ),
    "fsdp, per layer, recomputed": _case(
        reparam={"support": "blocks"},
        parallel={"engine": "fsdp", "prefetch_blocks": 2},
        optim={"update": "per_layer", "state_bits": 8},
        train={"activation_checkpointing": "full"},
    ),
    "zero 1": _case(parallel={"engine": "zero", "zero_stage": 1}),
    "zero 2, all": _case(reparam={"restart_every": 9}, parallel={"engine": "zero", "zero_stage": 2, "shard": "all"}),
    "zero 3": _case(reparam={"restart_every": 9}, parallel={"engine": "zero", "zero_stage": 3}),
    "zero 1, muon": _case(optim={"factors": "muon"}, parallel={"engine": "zero", "zero_stage": 1}),
    "zero 3, spectron": _case(
        reparam={"rank": 32},
        optim={"factors": "spectron", "newton_schulz": "fp32"},
        parallel={"engine": "zero", "zero_stage": 3},
    ),
    "zero 3, dense layer": _case(
        model={"num_layers": 4}, reparam={"dense_layers": [1]}, parallel={"engine": "zero", "zero_stage": 3}
    ),
}
"""What the tests compare on two ranks."""


def letting_go(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo's thread holds a message for a moment after it has been waited for; not seen if one waits a little more."""

    @functools.wraps(collective)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = collective(*args, **kwargs)
        time.sleep(0.02)  # on a busy machine, too
        return result

    return wrapped


def timeline(config: Config, env: Environment) -> Timeline:
    """What this rank takes in the second update."""
    gc.collect()  # engines of earlier runs are in cycles
    return [(point.phase, point.where, dict(point.components)) for point in follow(config, env)]


def main(out: str, configurations: str | None = None) -> None:
    torch.set_num_threads(1)
    env = environment.start(120, need_group=True)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "reduce", "broadcast"):
        setattr(dist, name, letting_go(getattr(dist, name)))
    values = CASES if configurations is None else json.loads(Path(configurations).read_text())
    found = {name: env.gather(timeline(build_config(value), env)) for name, value in values.items()}
    if env.is_main:
        Path(out).write_text(json.dumps(found))
    env.gather(None)  # no rank is gone before all are done
    sys.stderr.flush()
    os._exit(0)  # see cases.py


if __name__ == "__main__":
    main(*sys.argv[1:])
