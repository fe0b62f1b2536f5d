"""Rules that involve several fields, or the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

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
        raise ConfigError(
            f"train.global_batch = {train.global_batch} is not a multiple of train.micro_batch = "
            f"{train.micro_batch} times {world_size} ranks = {per_pass}; change one of them, for example "
            f"train.global_batch={-(-train.global_batch // per_pass) * per_pass}"
        )
    return train.global_batch // per_pass


def without_effect(config: Config) -> Iterator[str]:
    """Yields a warning for every setting that was changed from its default and does nothing."""
    defaults = Config()
    if config.reparam.method == "full":
        for key in ("rank", "density", "alpha", "support"):
            if config.preset is None and getattr(config.reparam, key) != getattr(defaults.reparam, key):
                yield f"reparam.{key} has no effect with reparam.method=full"
    if config.reparam.method == "lowrank" and config.preset is None:
        for key in ("density", "support"):
            if getattr(config.reparam, key) != getattr(defaults.reparam, key):
                yield f"reparam.{key} has no effect with reparam.method=lowrank"
    if config.parallel.engine == "ddp":
        for key in ("zero_stage", "shard"):
            if getattr(config.parallel, key) != getattr(defaults.parallel, key):
                yield f"parallel.{key} has no effect with parallel.engine=ddp"
    if config.eval.source is None and config.eval.every != defaults.eval.every:
        yield "eval.every has no effect without eval.source"
    if not config.tracking.mlflow and config.tracking.mlflow_uri is not None:
        yield "tracking.mlflow_uri has no effect with tracking.mlflow=false"
