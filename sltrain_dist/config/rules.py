"""Rules that involve several fields, or the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError


def check_fields(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, what to change) for every combination of fields that cannot be run."""
    model, reparam, train, optim = config.model, config.reparam, config.train, config.optim
    if model.hidden_size % model.num_heads:
        yield "model.num_heads", f"does not divide model.hidden_size = {model.hidden_size}"
    elif model.head_dim % 2:
        yield "model.num_heads", f"gives the odd head dimension {model.head_dim}; rotary embeddings need an even one"
    if model.num_heads % model.kv_heads:
        yield "model.num_kv_heads", f"does not divide model.num_heads = {model.num_heads}"
    smallest = min(model.hidden_size, model.intermediate_size, model.kv_heads * model.head_dim)
    if reparam.method != "full" and reparam.rank > smallest:
        yield "reparam.rank", f"is larger than the smallest dimension of a replaced layer; at most {smallest}"
    leaves_none = reparam.support == "random" and int(reparam.density * model.hidden_size * smallest) < 1
    if reparam.method == "sltrain" and leaves_none:  # the other supports have at least one value a row
        yield "reparam.density", "leaves the smallest replaced layer without a single sparse value; raise it"
    if (train.steps is None) == (train.tokens is None) and not train.dry_run:
        yield "train.steps", f"set exactly one of train.steps and train.tokens (= {train.tokens})"
    if train.steps is not None and optim.warmup_steps > train.steps:
        yield "optim.warmup_steps", f"is longer than the run; at most train.steps = {train.steps}"
    if train.global_batch % train.micro_batch:
        yield "train.micro_batch", f"does not divide train.global_batch = {train.global_batch}"


def micro_batches_per_update(config: Config, world_size: int) -> int:
    """Forward passes that each rank makes for one update.

    Raises:
        ConfigError: `train.global_batch` is not a multiple of `train.micro_batch` times the ranks.
    """
    train = config.train
    per_pass = train.micro_batch * world_size
    if train.global_batch % per_pass:
        if train.global_batch % world_size == 0:
            remedy = f"train.micro_batch={math.gcd(train.micro_batch, train.global_batch // world_size)}"
        else:
            remedy = f"train.global_batch={-(-train.global_batch // per_pass) * per_pass}, or another number of ranks"
        raise ConfigError(
            f"train.global_batch = {train.global_batch} is not a multiple of train.micro_batch = "
            f"{train.micro_batch} times {world_size} ranks = {per_pass}; set for example {remedy}"
        )
    return train.global_batch // per_pass


def without_effect(config: Config) -> Iterator[str]:
    """Yields a warning for every setting that says something and does nothing."""
    usual = Config.model_validate(PRESETS[config.preset] if config.preset else {})
    optim, parallel, tracking = config.optim, config.parallel, config.tracking
    cases = (
        (
            "reparam.method=full",
            config.reparam.method == "full",
            ("reparam.rank", "reparam.density", "reparam.alpha", "reparam.support"),
        ),
        ("reparam.method=lowrank", config.reparam.method == "lowrank", ("reparam.density", "reparam.support")),
        ("parallel.engine=ddp", parallel.engine == "ddp", ("parallel.zero_stage", "parallel.shard")),
        ("data.workers=0", config.data.workers == 0, ("data.prefetch",)),
        ("optim.name=sgd", optim.name == "sgd", ("optim.beta1", "optim.beta2", "optim.eps")),
        ("optim.schedule=constant", optim.schedule == "constant", ("optim.min_lr_ratio",)),
        ("eval.source=null", config.eval.source is None, ("eval.every", "eval.tokens", "eval.micro_batch")),
        (
            "tracking.mlflow=false",
            not tracking.mlflow,
            ("tracking.mlflow_uri", "tracking.experiment", "tracking.run_name"),
        ),
    )
    for cause, holds, keys in cases:
        for key in keys if holds else ():
            if _value(config, key) != _value(usual, key):
                yield f"{key} has no effect with {cause}"


def _value(config: Config, key: str) -> Any:
    section, _, field = key.partition(".")
    return getattr(getattr(config, section), field)
