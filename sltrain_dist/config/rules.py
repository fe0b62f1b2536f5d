"""Rules that involve several fields, or the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.schema import Config, ParallelConfig, TrainConfig
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
    yield from _check_data(config)
    yield from _check_parallel(config)


DEEPSPEED_KEYS: dict[str, str] = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.clip",
    "gradient_allreduce_op": "parallel.engine",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_types": "train.dtype",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "zero_allow_untested_optimizer": "optim.name",
    "zero_force_ds_cpu_optimizer": "optim.name",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.cpu_offload",
    "zero_optimization.compute_grad_norm": "optim.clip",
}
"""Keys of DeepSpeed's configuration that are made from a setting of ours, and that setting."""


def _check_data(config: Config) -> Iterator[tuple[str, str]]:
    source, weights = config.data.source, config.data.weights
    if weights is not None and not isinstance(source, list):
        yield "data.weights", "belongs to a list of sources; make data.source one, or set null"
    elif weights is not None and len(weights) != len(source):
        yield "data.weights", f"has {len(weights)} entries for the {len(source)} of data.source"


def _check_parallel(config: Config) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    engine = f"{parallel.engine} stage {parallel.zero_stage}" if parallel.engine == "zero" else parallel.engine
    local_only = _keeps_whole_gradients(parallel)
    if parallel.accumulate == "sharded" and local_only:
        yield "parallel.accumulate", f"{engine} keeps whole gradients; set auto, or use fsdp, or zero stage 2 or 3"
    if parallel.accumulate == "local" and parallel.engine == "zero" and not local_only:
        yield "parallel.accumulate", f"{engine} reduces at every micro-batch; set auto, or use fsdp, or zero stage 1"
    if parallel.replicas > 1 and parallel.engine != "fsdp":
        yield "parallel.replicas", "groups of replicas are there with parallel.engine=fsdp only; set 1"
    if parallel.cpu_offload and parallel.engine == "ddp":
        yield "parallel.cpu_offload", "ddp keeps everything on the device; use fsdp, or zero"
    if parallel.cpu_offload and parallel.engine == "zero" and config.train.dtype == "bf16":
        yield (
            "parallel.cpu_offload",
            "DeepSpeed offloads fp32 states only; set train.dtype=mixed or fp32, or parallel.engine=fsdp",
        )
    for key in leaf_keys(parallel.deepspeed):
        owner = next((ours for theirs, ours in DEEPSPEED_KEYS.items() if f"{key}.".startswith(f"{theirs}.")), None)
        if owner is not None:
            yield "parallel.deepspeed", f"its {key} is made from {owner}; set that"


def leaf_keys(value: Any, key: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted keys of all values below `key` that are not mappings, or empty ones."""
    if isinstance(value, Mapping) and value:
        for part, below in value.items():
            yield from leaf_keys(below, (*key, str(part)))
    elif key:
        yield ".".join(key)


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


def is_recomputed(index: int, train: TrainConfig) -> bool:
    """Whether activations of block number `index` are computed again, all or all but attention's output."""
    if train.activation_checkpointing == "selective" and train.checkpoint_policy == "blocks":
        return index % train.checkpoint_every == 0
    return train.activation_checkpointing != "none"


def keeps_attention(train: TrainConfig) -> bool:
    """Whether blocks that are computed again keep attention's output."""
    return train.activation_checkpointing == "selective" and train.checkpoint_policy == "attention"


def accumulates_locally(parallel: ParallelConfig) -> bool:
    """Whether gradients wait whole for the update's last micro-batch, with one reduction per update."""
    if parallel.accumulate == "auto":
        return _keeps_whole_gradients(parallel)
    return parallel.accumulate == "local"


def _keeps_whole_gradients(parallel: ParallelConfig) -> bool:
    """Whether the engine does so of itself; only fsdp can do otherwise."""
    return parallel.engine == "ddp" or (parallel.engine == "zero" and parallel.zero_stage == 1)


def without_effect(config: Config) -> Iterator[str]:
    """Yields a warning for every setting that says something and does nothing."""
    usual = Config.model_validate(PRESETS[config.preset] if config.preset else {})
    optim, parallel, train, tracking = config.optim, config.parallel, config.train, config.tracking
    cases = (
        (
            "reparam.method=full",
            config.reparam.method == "full",
            ("reparam.rank", "reparam.density", "reparam.alpha", "reparam.support"),
        ),
        ("reparam.method=lowrank", config.reparam.method == "lowrank", ("reparam.density", "reparam.support")),
        ("parallel.engine=ddp", parallel.engine == "ddp", ("parallel.shard",)),
        (
            f"parallel.engine={parallel.engine}",
            parallel.engine != "zero",
            ("parallel.zero_stage", "parallel.deepspeed"),
        ),
        (f"parallel.engine={parallel.engine}", parallel.engine != "fsdp", ("parallel.reshard_after_forward",)),
        (
            f"parallel.engine={parallel.engine}",
            parallel.engine == "ddp" or (parallel.engine == "zero" and parallel.zero_stage < 3),
            ("parallel.prefetch_blocks",),
        ),
        (
            f"train.activation_checkpointing={train.activation_checkpointing}",
            train.activation_checkpointing != "selective",
            ("train.checkpoint_policy", "train.checkpoint_every"),
        ),
        (
            "train.checkpoint_policy=attention",
            train.checkpoint_policy == "attention",
            ("train.checkpoint_every",),
        ),
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
