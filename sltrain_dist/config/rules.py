"""Configuration rules that involve several fields, or the number of ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.schema import PROJECTED_METHODS, Config, OptimConfig, ParallelConfig
from sltrain_dist.errors import ConfigError

_MAX_PARAMETERS = 10**14
"""Most parameters of a model, counted as dense: dozens of times the largest ever trained, 200 TB in bf16."""

_MAX_TOKENS = 2**30
"""Most tokens in one forward pass of a rank: a single activation of width 64 would take 128 GB."""


def check_fields(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, what is wrong and what to change) for every invalid combination of fields."""
    model, reparam, train, optim = config.model, config.reparam, config.train, config.optim
    if model.hidden_size % model.num_heads:
        yield "model.num_heads", f"does not divide model.hidden_size = {model.hidden_size}"
    elif model.head_dim % 2:
        yield "model.num_heads", f"gives the odd head dimension {model.head_dim}; rotary embeddings need an even one"
    if model.num_heads % model.kv_heads:
        yield "model.num_kv_heads", f"does not divide model.num_heads = {model.num_heads}"
    smallest = min(model.hidden_size, model.intermediate_size, model.kv_heads * model.head_dim)
    if reparam.method not in ("full", "apollo-mini") and reparam.rank > smallest:
        yield "reparam.rank", f"is larger than the smallest dimension of a replaced layer; at most {smallest}"
    empty_support = reparam.support == "random" and int(reparam.density * model.hidden_size * smallest) < 1
    if reparam.method == "sltrain" and empty_support:  # the other supports have at least one value per row
        yield "reparam.density", "leaves the smallest replaced layer without any sparse value; increase it"
    if (train.steps is None) == (train.tokens is None) and not train.dry_run:
        yield "train.steps", f"set exactly one of train.steps and train.tokens (= {train.tokens})"
    if train.steps is not None and optim.warmup_steps > train.steps:
        yield "optim.warmup_steps", f"is longer than the run; at most train.steps = {train.steps}"
    elif optim.schedule == "wsd" and train.steps is not None and _decay_overlaps_warmup(optim, train.steps):
        yield (
            "optim.decay_ratio",
            f"begins the decay before the end of the warm-up; lower it or optim.warmup_steps = {optim.warmup_steps}, "
            f"or raise train.steps = {train.steps}",
        )
    if train.global_batch % train.micro_batch:
        yield "train.micro_batch", f"does not divide train.global_batch = {train.global_batch}"
    yield from _check_dense_layers(config)
    yield from _check_restarts(config)
    yield from _check_size(config)
    yield from _check_optimizer(config)
    yield from _check_projected(config)
    yield from _check_factors(config)
    yield from _check_data(config)
    yield from _check_parallel(config)
    yield from _check_per_layer(config)
    yield from _check_spikes(config)
    yield from _check_int8(config)


def _decay_overlaps_warmup(optim: OptimConfig, steps: int) -> bool:
    """Returns whether the decay of wsd begins before the last update of the warm-up, which is the first at the peak."""
    return optim.warmup_steps - 1 > optim.stable_ratio * (steps - 1)


def _check_dense_layers(config: Config) -> Iterator[tuple[str, str]]:
    key, listed, layers = "reparam.dense_layers", config.reparam.dense_layers, config.model.num_layers
    outside = [index for index in listed if not -layers <= index < layers]
    twice = [number for number, count in Counter(index % layers for index in listed).items() if count > 1]
    if listed and config.reparam.method not in ("sltrain", "lowrank", "cola"):
        yield key, f"is for reparam.method=sltrain, lowrank or cola; set it to [] with {config.reparam.method}"
    elif outside:
        yield (
            key,
            f"has {outside[0]}, but model.num_layers = {layers}; the layers are 0 to {layers - 1}, or from the end "
            f"-1 to {-layers}",
        )
    elif twice:
        names = " and ".join(str(index) for index in listed if index % layers == twice[0])
        yield key, f"has decoder layer {twice[0]} twice, as {names}; remove one of the two"
    elif len(listed) == layers:
        yield key, "has all decoder layers; remove one of them, or set reparam.method=full and this to []"


def _check_restarts(config: Config) -> Iterator[tuple[str, str]]:
    reparam, every, method = config.reparam, config.reparam.restart_every, config.reparam.method
    if every == 0:
        return
    if method not in ("sltrain", "lowrank", "relora"):
        yield (
            "reparam.restart_every",
            f"needs a low-rank product BA, which reparam.method={method} does not have; set it to 0, or "
            "reparam.method=sltrain, lowrank or relora",
        )
    if reparam.restart_warmup >= every:
        yield (
            "reparam.restart_warmup",
            f"does not end before the next restart, so that the learning rate would never come back; set it below "
            f"reparam.restart_every = {every}, or restart less often",
        )
    if reparam.restart_states == "factors" and config.parallel.engine == "zero":
        yield (
            "reparam.restart_states",
            "cannot be factors with DeepSpeed, which counts the updates of all sharded parameters together; set it to "
            "all, or parallel.engine=fsdp or ddp",
        )


def _check_spikes(config: Config) -> Iterator[tuple[str, str]]:
    spike, checkpoint = config.train.spike, config.checkpoint
    if spike == "skip" and config.optim.update == "per_layer":
        yield (
            "train.spike",
            "cannot be skip with optim.update=per_layer, which updates layers before the gradient norm is known; set "
            "it to rewind or off, or optim.update=whole",
        )
    if spike == "rewind" and not (checkpoint.every or checkpoint.keep_every):
        yield "train.spike", "is rewind, but no checkpoints are made during the run; set checkpoint.every"


def _check_size(config: Config) -> Iterator[tuple[str, str]]:
    """Refuses sizes that no machine could hold, so that a typing error fails at once and not after hours."""
    model, train, seq_len = config.model, config.train, config.data.seq_len
    layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size
    parameters = model.num_layers * layer + 2 * model.vocab_size * model.hidden_size
    if parameters > _MAX_PARAMETERS:
        yield (
            "model.hidden_size",
            f"makes a model of about {parameters:.1e} dense parameters with the section's other sizes; "
            f"reduce them to at most {_MAX_PARAMETERS:.0e}",
        )
    for key, batch in (("train.micro_batch", train.micro_batch), ("eval.micro_batch", config.eval.micro_batch or 1)):
        if batch * seq_len > _MAX_TOKENS:
            yield (
                key,
                f"times data.seq_len = {seq_len} is more than the {_MAX_TOKENS:,} tokens that a device could hold",
            )


def _check_per_layer(config: Config) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if config.optim.update == "whole":
        return
    if parallel.engine == "zero":
        yield (
            "optim.update",
            "per_layer is not supported with DeepSpeed, which reduces gradients in buckets and updates flat partitions "
            "as a whole; set parallel.engine=fsdp or ddp, or optim.update=whole",
        )
    elif parallel.cpu_offload:
        yield (
            "optim.update",
            "per_layer is not supported with parallel.cpu_offload=true, where gradients reach the host only after the "
            "backward pass; set parallel.cpu_offload=false, or optim.update=whole",
        )


def _check_int8(config: Config) -> Iterator[tuple[str, str]]:
    """Refuses settings that `reparam.weight_bits=8` does not support."""
    if config.reparam.weight_bits == 16:
        return
    optim, train = config.optim, config.train
    cases = (
        (config.reparam.method != "sltrain", "need reparam.method=sltrain; set it"),
        (config.parallel.engine != "ddp", "are replicated on every rank; set parallel.engine=ddp"),
        (optim.name not in ("adamw", "adam"), "need Adam, whose update rounds them; set optim.name=adamw or adam"),
        (optim.factors != "adam", "need Adam, whose update rounds them; set optim.factors=adam"),
        (optim.master_weights, "have no fp32 copies; set optim.master_weights=false"),
        (train.dtype == "mixed", "replace the fp32 parameters of mixed precision; set train.dtype=bf16 or fp32"),
        (train.compile, "cannot be traced by torch.compile; set train.compile=false"),
    )
    for holds, remedy in cases:
        if holds:
            yield "reparam.weight_bits", f"int8 weights {remedy}, or reparam.weight_bits=16"


def _check_optimizer(config: Config) -> Iterator[tuple[str, str]]:
    optim, engine, bf16 = config.optim, config.parallel.engine, config.train.dtype == "bf16"
    if optim.master_weights and optim.stochastic_rounding:
        yield (
            "optim.stochastic_rounding",
            "has no use with optim.master_weights, which keeps fp32 copies; set one of the two to false",
        )
    if optim.name in ("sgd", "adafactor"):
        if optim.state_bits != 16:
            yield "optim.state_bits", f"is for Adam's states, which optim.name={optim.name} does not have; set it to 16"
        for key in ("stochastic_rounding", "master_weights"):
            if getattr(optim, key):
                yield f"optim.{key}", f"is not supported with optim.name={optim.name}; set it to false, or use adamw"
    if optim.name == "adafactor" and engine != "ddp":
        yield "optim.name", "adafactor needs whole parameters on every rank; set parallel.engine=ddp, or use adamw"
    if engine == "zero":
        other = "; set parallel.engine=fsdp or ddp"
        if optim.state_bits in (8, 4) or (optim.state_bits == 32 and bf16):
            reason = "DeepSpeed keeps optimizer states in the parameters' type"
            yield "optim.state_bits", f"{reason}{other}, or optim.state_bits=16"
        if optim.stochastic_rounding and bf16:
            yield (
                "optim.stochastic_rounding",
                f"does not work with DeepSpeed, which writes the parameters itself{other}",
            )
        if optim.master_weights and bf16:
            yield "optim.master_weights", f"is not supported with train.dtype=bf16 under DeepSpeed{other}"


def _check_projected(config: Config) -> Iterator[tuple[str, str]]:
    """Refuses settings that the methods with a projected gradient do not support."""
    method, optim = config.reparam.method, config.optim
    if method not in PROJECTED_METHODS:
        return
    if optim.name not in ("adamw", "adam"):
        yield "optim.name", f"must be adamw with reparam.method={method}, which projects Adam's gradient; set it"
    elif optim.name == "adam" and optim.weight_decay > 0:
        yield (
            "optim.weight_decay",
            f"is decoupled in the published code of {method}; set optim.name=adamw, or this to 0",
        )
    for key in ("stochastic_rounding", "master_weights"):
        if getattr(optim, key):
            yield f"optim.{key}", f"is not supported with reparam.method={method}; set it to false"


def _check_factors(config: Config) -> Iterator[tuple[str, str]]:
    """Refuses settings that `optim.factors: muon` or `spectron` does not support."""
    optim, method = config.optim, config.reparam.method
    if optim.factors == "adam":
        return
    to_adam = ", or optim.factors=adam"
    if method not in ("sltrain", "lowrank", "full"):
        yield "optim.factors", f"is not supported with reparam.method={method}; set it to adam"
    elif optim.factors == "spectron" and method == "full":
        yield (
            "optim.factors",
            "spectron updates pairs of B and A, which reparam.method=full does not have; set it to muon or adam, or "
            "reparam.method=sltrain or lowrank",
        )
    if optim.name not in ("adamw", "adam"):
        yield "optim.name", f"must be adamw or adam with optim.factors={optim.factors}; set it{to_adam}"
    if optim.update == "per_layer":
        yield (
            "optim.update",
            f"cannot be per_layer with optim.factors={optim.factors}, whose update needs whole matrices of all ranks; "
            f"set it to whole{to_adam}",
        )


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
"""Keys of DeepSpeed's configuration that are derived from a setting of ours, with that setting."""


def _check_data(config: Config) -> Iterator[tuple[str, str]]:
    source, weights = config.data.source, config.data.weights
    if config.data.reset_attention and config.data.batching != "pack":
        yield "data.reset_attention", "a padded row holds one document; set it to false, or set data.batching=pack"
    if weights is not None and not isinstance(source, list):
        yield "data.weights", "needs a list of sources; make data.source a list, or set data.weights=null"
    elif weights is not None and len(weights) != len(source):
        yield "data.weights", f"has {len(weights)} entries for {len(source)} data.source entries; give each source one"


def _check_parallel(config: Config) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    engine = f"{parallel.engine} stage {parallel.zero_stage}" if parallel.engine == "zero" else parallel.engine
    only_local = parallel.keeps_whole_gradients
    if parallel.accumulate == "sharded" and only_local:
        yield "parallel.accumulate", f"{engine} keeps whole gradients; set it to auto, or use fsdp or zero stage 2 or 3"
    if parallel.accumulate == "local" and parallel.engine == "zero" and not only_local:
        yield "parallel.accumulate", f"{engine} reduces every micro-batch; set it to auto, or use fsdp or zero stage 1"
    if parallel.replicas > 1 and parallel.engine != "fsdp":
        yield "parallel.replicas", "above 1 is supported with parallel.engine=fsdp only; set it to 1, or use fsdp"
    if parallel.cpu_offload and parallel.engine == "ddp":
        yield "parallel.cpu_offload", "is not supported with ddp; set it to false, or use fsdp or zero"
    if parallel.cpu_offload and parallel.engine == "zero" and config.train.dtype == "bf16":
        yield (
            "parallel.cpu_offload",
            "DeepSpeed offloads fp32 states only; set train.dtype=mixed or fp32, or parallel.engine=fsdp",
        )
    for key in leaf_keys(parallel.deepspeed):
        owner = next((ours for theirs, ours in DEEPSPEED_KEYS.items() if f"{key}.".startswith(f"{theirs}.")), None)
        if owner is not None:
            yield "parallel.deepspeed", f"its key {key} is derived from {owner}; set {owner} instead"


def leaf_keys(value: Any, key: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the dotted keys of all values below `key` that are not mappings, or are empty mappings."""
    if isinstance(value, Mapping) and value:
        for part, below in value.items():
            yield from leaf_keys(below, (*key, str(part)))
    elif key:
        yield ".".join(key)


def micro_batches_per_update(config: Config, world_size: int) -> int:
    """Number of micro-batches that each rank computes per update.

    Raises:
        ConfigError: `train.global_batch` is not a multiple of `train.micro_batch` times `world_size`, or the
            settings of per-layer updates do not allow several micro-batches.
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
    passes = train.global_batch // per_pass
    if passes > 1 and config.optim.update == "per_layer":
        _check_accumulation(config, passes, largest=train.global_batch // world_size)
    return passes


def _check_accumulation(config: Config, passes: int, largest: int) -> None:
    """Refuses per-layer updates whose settings do not allow several micro-batches per update."""
    optim = config.optim
    if optim.per_layer_accumulation == "refuse":
        raise ConfigError(
            f"optim.per_layer_accumulation=refuse, but an update takes {passes} micro-batches on each rank; set "
            f"train.micro_batch={largest}, or optim.per_layer_accumulation=keep, which keeps all gradients between them"
        )
    if optim.passes_twice:
        raise ConfigError(
            f"optim.clip_mode=two_pass needs one micro-batch per update, but there are {passes} on each rank; set "
            f"train.micro_batch={largest}, or optim.clip_mode=previous_norm"
        )


def check_replicas(parallel: ParallelConfig, world_size: int) -> None:
    """Checks that `parallel.replicas` divides the ranks into equal groups of at least two.

    Raises:
        ConfigError: It does not.
    """
    replicas = parallel.replicas
    if world_size % replicas or world_size == replicas > 1:
        raise ConfigError(
            f"parallel.replicas = {replicas} does not divide {world_size} ranks into groups of at least two; "
            f"set it to a smaller divisor of {world_size}, or use parallel.engine=ddp for whole replicas"
        )


def check_ranks(config: Config, ranks: int) -> None:
    """Checks that the batch sizes and `parallel.replicas` suit the number of ranks.

    Raises:
        ConfigError: They do not; the message says what to change.
    """
    micro_batches_per_update(config, ranks)
    if config.parallel.engine == "fsdp":
        check_replicas(config.parallel, ranks)


def check_trainable(config: Config) -> None:
    """Checks that the method can be trained with the other settings. The paper's accounting does not depend on these.

    Raises:
        ConfigError: It cannot, for a reason that the message says.
    """
    method, engine = config.reparam.method, config.parallel.engine
    if engine != "ddp" and method in ("relora", *PROJECTED_METHODS):
        raise ConfigError(
            f"parallel.engine = {engine!r} shards the weights, which reparam.method={method} needs whole on every "
            "rank; set parallel.engine=ddp, or use another method"
        )
    if method == "relora" and config.reparam.restart_every == 0:
        raise ConfigError(
            "reparam.method = 'relora' never merges its factors with reparam.restart_every = 0; set it to the number "
            "of updates between two merges, such as 1000"
        )


def without_effect(config: Config) -> Iterator[str]:
    """Yields a warning for every setting that differs from its default and has no effect."""
    default = Config.model_validate(PRESETS[config.preset] if config.preset else {})
    for cause, key in _idle(config):
        if field_value(config, key) != field_value(default, key):
            yield f"{key} has no effect with {cause}"


def idle_keys(config: Config) -> frozenset[str]:
    """The dotted keys of all fields that have no effect in this configuration, whatever their value."""
    return frozenset(key for _, key in _idle(config))


def _idle(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (cause, dotted key) for every field that has no effect."""
    optim, parallel, train, tracking = config.optim, config.parallel, config.train, config.tracking
    sparse = tuple(f"reparam.{name}" for name in ("density", "support", "support_seed", "path", "row_block_bytes"))
    cases = (
        (
            "reparam.method=full",
            config.reparam.method == "full",
            ("reparam.rank", "reparam.alpha", *sparse),
        ),
        (
            f"reparam.method={config.reparam.method}",
            config.reparam.method in ("lowrank", "relora"),
            sparse,
        ),
        (
            f"reparam.method={config.reparam.method}",
            config.reparam.method in ("cola", *PROJECTED_METHODS),
            ("reparam.alpha", *sparse),
        ),
        ("reparam.method=apollo-mini", config.reparam.method == "apollo-mini", ("reparam.rank",)),
        (
            f"reparam.method={config.reparam.method}",
            config.reparam.method not in PROJECTED_METHODS,
            ("optim.projection_every", "optim.projection_scale"),
        ),
        (
            "reparam.restart_every=0",
            config.reparam.restart_every == 0,
            ("reparam.restart_warmup", "reparam.restart_states"),
        ),
        (
            "train.spike=off",
            train.spike == "off",
            ("train.spike_window", "train.spike_threshold", "train.spike_limit"),
        ),
        ("data.batching=pack", config.data.batching == "pack", ("data.truncate",)),
        ("reparam.path=factored", config.reparam.path == "factored", ("reparam.row_block_bytes",)),
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
            f"train.checkpoint_policy={train.checkpoint_policy}",
            train.checkpoint_policy != "blocks",
            ("train.checkpoint_every",),
        ),
        ("data.workers=0", config.data.workers == 0, ("data.prefetch",)),
        (
            f"optim.name={optim.name}",
            optim.name in ("sgd", "adafactor"),
            ("optim.beta1", "optim.beta2", "optim.eps"),
        ),
        (
            f"train.dtype={train.dtype}",
            train.dtype != "bf16",
            ("optim.stochastic_rounding", "optim.master_weights"),
        ),
        (
            "optim.factors=adam",
            optim.factors == "adam",
            ("optim.factors_lr_ratio", "optim.factors_scale", "optim.momentum", "optim.newton_schulz"),
        ),
        ("optim.update=whole", optim.update == "whole", ("optim.per_layer_accumulation", "optim.clip_mode")),
        ("optim.clip=0", optim.clip == 0, ("optim.clip_mode",)),
        ("optim.schedule=constant", optim.schedule == "constant", ("optim.min_lr_ratio",)),
        (f"optim.schedule={optim.schedule}", optim.schedule != "wsd", ("optim.decay_ratio", "optim.decay_type")),
        (
            "eval.source=null",
            config.eval.source is None,
            ("eval.every", "eval.tokens", "eval.micro_batch", "eval.samples", "eval.sample_tokens"),
        ),
        ("eval.samples=[]", not config.eval.samples, ("eval.sample_tokens",)),
        (
            "tracking.mlflow=false",
            not tracking.mlflow,
            ("tracking.mlflow_uri", "tracking.experiment", "tracking.run_name", "tracking.mlflow_parent"),
        ),
    )
    for cause, holds, keys in cases:
        for key in keys if holds else ():
            yield cause, key


def field_value(config: Config, key: str) -> Any:
    """Returns the value of the field with this dotted key, such as `train.steps`."""
    section, _, field = key.partition(".")
    return getattr(getattr(config, section), field)
