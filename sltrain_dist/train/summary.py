"""The start-up summary of a run (model, data, training, outputs), and its closing lines."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.run_files import CHECKPOINTS, METRICS, SAMPLES
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ExitCode
from sltrain_dist.models.count import (
    block_linears,
    count_parameters,
    factor_pairs,
    parameter_bytes,
    parameter_shapes,
    trained_shapes,
)
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.projected.settings import optimizer_settings
from sltrain_dist.optim.state_layout import is_orthogonalized, state_bytes
from sltrain_dist.parallel.communication import Traffic, update_traffic
from sltrain_dist.parallel.placement import accumulated_gradient_bytes
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.sparse_lowrank.cost import choose_route
from sltrain_dist.sparse_lowrank.functional import this_device
from sltrain_dist.sparse_lowrank.route_kernels import LayerShape
from sltrain_dist.sparse_lowrank.sizes import effective_density, stored_index_bytes
from sltrain_dist.tracking.console import format_bytes, format_count
from sltrain_dist.tracking.mlflow import Destination
from sltrain_dist.train.run_directory import Outcome

Sections = dict[str, list[tuple[str, str]]]


def summarise(config: Config, env: Environment, run_dir: Path, shards: int, resumed_step: int) -> Sections:
    """Returns lists of (name, value) by title, for the console."""
    return {
        "Model": _model(config),
        **({"Operator": _operator(config, env)} if config.reparam.method == "sltrain" else {}),
        "Data": _data(config, shards),
        "Training": _training(config, env, resumed_step),
        **({"Communication": _communication(config, env)} if env.world_size > 1 else {}),
        "Outputs": _outputs(config, run_dir),
    }


def _model(config: Config) -> list[tuple[str, str]]:
    counted = count_parameters(config.model, config.reparam)
    full = count_parameters(config.model, config.reparam.model_copy(update={"method": "full"}))
    width = config.train.precision.parameter_bytes
    shapes = parameter_shapes(config.model, config.reparam)
    optim = optimizer_settings(config)
    weights = sum(parameter_bytes(name, shape, config.reparam, width) for name, shape in shapes)
    shapes = trained_shapes(config.model, config.reparam)
    states = sum(state_bytes(TensorRange.whole(name, shape), optim, width) for name, shape in shapes)
    kinds = [
        ("embedding, head, norms", counted.remainder),
        ("low-rank factors", counted.factors),
        ("sparse values", counted.sparse),
        ("frozen weights" if config.reparam.method == "relora" else "dense weights", counted.dense),
    ]
    lines = [(kind, format_count(number)) for kind, number in kinds if number]
    if config.reparam.dense_layers:
        lines.append(("dense layers", ", ".join(map(str, config.reparam.dense_layers))))
    lines.append(("parameters", f"{format_count(counted.total)}  ({counted.total / full.total:.0%} of full rank)"))
    int8 = "  int8 (experimental), but for embedding and norms" if config.reparam.weight_bits == 8 else ""
    lines.append(("weights", f"{format_bytes(weights)}{int8}"))
    trained = sum(math.prod(shape) for _, shape in shapes)
    lines.append(("gradients", f"{format_bytes(width * trained)}  before sharding"))
    lines.append(("optimizer states", f"{format_bytes(states)}  before sharding"))
    return lines


def _operator(config: Config, env: Environment) -> list[tuple[str, str]]:
    """Returns the support, and the route of each layer shape in training."""
    reparam, model = config.reparam, config.model
    linears = block_linears(model)
    layers = model.num_layers - len(reparam.dense_layers)
    stored = layers * sum(stored_index_bytes(s.m, s.n, reparam.density, reparam.support) for s in linears)
    lines = [("support", f"{reparam.support}, {format_bytes(stored)} of indices")]
    for linear in linears:
        m, n = linear.m, linear.n
        route = choose_route(
            LayerShape.of(m, n, reparam, linear.sharing),
            config.train.micro_batch * config.data.seq_len,
            bits=8 * config.train.precision.product_bytes,
            device=this_device(env.device.type),
            path=reparam.path,
        )
        density = effective_density(m, n, reparam.density, reparam.support)
        backward = ", dense gradient" if route.dense_backward else ""
        lines.append((f"{m}×{n}", f"{route.path}{backward}, density {density:.4f}"))
    return list(dict.fromkeys(lines))


def _data(config: Config, shards: int) -> list[tuple[str, str]]:
    data = config.data
    source = data.source if isinstance(data.source, str) else ", ".join(data.source)
    return [
        ("source", f"{source}  ({shards} shards)"),
        ("tokenizer", data.tokenizer),
        ("rows", f"{data.seq_len} tokens, {data.batching}"),
    ]


def _training(config: Config, env: Environment, resumed_step: int) -> list[tuple[str, str]]:
    train, parallel, optim = config.train, config.parallel, config.optim
    engine: str = "single process" if env.world_size == 1 and parallel.engine == "ddp" else parallel.engine
    if parallel.engine == "zero":
        engine = f"zero stage {parallel.zero_stage}"
    if parallel.engine != "ddp":
        engine += f", shards {parallel.shard}" + (", offload to the CPU" if parallel.cpu_offload else "")
    budget = f"{train.steps} updates" if train.steps is not None else f"{format_count(train.tokens or 0)} tokens"
    per_update = train.global_batch * config.data.seq_len
    passes = micro_batches_per_update(config, env.world_size)
    where = torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else "CPU"
    clip = f"clip {optim.clip:g}" if optim.clip else "no clipping"
    if optim.clip and optim.update == "per_layer":
        clip += f" by {optim.clip_mode.replace('_', ' ')}"
    schedule: str = optim.schedule
    if schedule == "wsd":
        schedule += f" with a {optim.decay_type} decay over the last {optim.decay_ratio:.0%}"
    recomputed = sum(train.is_recomputed(index) for index in range(config.model.num_layers))
    kept = ", but attention" if train.keeps_attention else ""
    kept += " and linear layers" if train.keeps_products else ""
    layers = [
        *([f"activations of {recomputed} of {config.model.num_layers} recomputed{kept}"] if recomputed else []),
        *(["compiled"] if train.compile else []),
    ]
    waiting = "whole" if parallel.accumulates_locally else "sharded"
    return [
        ("engine", f"{engine}, {env.world_size} × {where}, {train.dtype}"),
        *([("decoder layers", ", ".join(layers))] if layers else []),
        ("budget", budget + (f", {resumed_step} made" if resumed_step else "")),
        (
            "update",
            f"{train.global_batch} sequences = {format_count(per_update)} token slots, in {passes} micro-batches"
            + (f", gradients {waiting} between them" if passes > 1 and env.world_size > 1 else ""),
        ),
        ("optimizer", f"{optim.name}, lr {optim.lr:g} ({schedule}, {optim.warmup_steps} warm-up), {clip}"),
        *([("matrices", _matrices(config))] if optim.factors != "adam" else []),
        *([("restarts", _restarts(config))] if config.reparam.restart_every else []),
        *([("per-layer updates", _per_layer(config, env.world_size, passes))] if optim.update == "per_layer" else []),
    ]


def _matrices(config: Config) -> str:
    """Says which optimizer updates which matrices, and how."""
    optim = config.optim
    named = parameter_shapes(config.model, config.reparam)
    number = sum(is_orthogonalized(name, optim) for name, _ in named)
    return (
        f"{number} by {optim.factors}, lr {optim.lr * optim.factors_lr_ratio:g} scaled by {optim.factors_scale}, "
        f"momentum {optim.momentum:g}, orthogonalized in {optim.newton_schulz}"
    )


def _restarts(config: Config) -> str:
    """Says when restarts are made, and what they do."""
    reparam, layers = config.reparam, len(factor_pairs(config.model, config.reparam))
    what = "merged into their frozen weights" if reparam.method == "relora" else "factored anew"
    which = "all parameters" if reparam.restart_states == "all" else "B and A"
    back = f"; the learning rate comes back over {reparam.restart_warmup} updates" if reparam.restart_warmup else ""
    return f"every {reparam.restart_every} updates: {layers} linear layers {what}, states of {which} cleared{back}"


def _per_layer(config: Config, world_size: int, passes: int) -> str:
    """Says when per-layer updates free the gradients."""
    if passes == 1:
        return "every gradient is freed during the backward pass"
    waiting = format_bytes(accumulated_gradient_bytes(config, world_size))
    return f"in the last of {passes} micro-batches; until then gradients take {waiting} on each rank"


def _communication(config: Config, env: Environment) -> list[tuple[str, str]]:
    """Returns the communication of an update, and that of the full-rank model."""
    reparam = config.reparam.model_copy(update={"method": "full"})
    ours = update_traffic(config, env.world_size)
    full = update_traffic(config.model_copy(update={"reparam": reparam}), env.world_size)
    lines = [("expected", describe_traffic(ours))]
    if config.reparam.method != "full":
        lines.append(("full rank", f"{describe_traffic(full)}; this run sends {ours.total / full.total:.2f} of it"))
    return lines


def describe_traffic(traffic: Traffic) -> str:
    """Formats traffic as one line, with the total and the bytes by kind of collective."""
    kinds = {name: sent for name, sent in asdict(traffic).items() if sent}
    parts = ", ".join(f"{name.replace('_', '-')} {format_bytes(sent)}" for name, sent in kinds.items())
    return f"{format_bytes(traffic.total)} sent by each rank in an update ({parts})"


def _outputs(config: Config, run_dir: Path) -> list[tuple[str, str]]:
    every = f"every {config.checkpoint.every} updates and " if config.checkpoint.every else ""
    lines = [
        ("run directory", str(run_dir)),
        ("checkpoints", f"{run_dir / CHECKPOINTS}, {every}at the end"),
        ("metrics", str(run_dir / METRICS)),
    ]
    if config.eval.samples and config.eval.source is not None:
        lines.append(("samples", str(run_dir / SAMPLES)))
    if config.tracking.mlflow:
        lines.append(("mlflow", str(Destination.of(config.tracking, run_dir))))
    return lines


def closing_lines(config: Config, run_dir: Path, outcome: Outcome, perplexities: list[tuple[int, float]]) -> list[str]:
    """Says how the run ended, and what the user may want to do next."""
    lines = [f"{outcome.reason} (step {outcome.step}, exit code {int(outcome.code)})"]
    if len(perplexities) > 1:
        path = " → ".join(f"{perplexity:,.1f} (step {step})" for step, perplexity in perplexities)
        lines.append(f"validation perplexity: {path}")
    if outcome.code is not ExitCode.DONE:
        lines.append("to resume: start the same command again")
        return lines
    budget = (
        f"train.steps={2 * outcome.step}" if config.train.steps else f"train.tokens={2 * (config.train.tokens or 0)}"
    )
    if config.optim.schedule == "wsd":
        longer = f"{budget} checkpoint.resume=PATH, a checkpoint from before the decay"
    else:
        longer = f"{budget}   (the learning rate follows the longer schedule)"
    lines.append(f"train longer:        the same command with {longer}")
    lines.append(f"try the model:       sltrain generate {shlex.quote(str(run_dir))} --prompt TEXT")
    lines.append(f"use the model:       sltrain export {shlex.quote(str(run_dir))} --output DIR")
    lines.append(
        "plan a 7B run:       sltrain plan --config configs/llama_7b.yaml --ranks 8 --device-memory 24GiB --search"
    )
    return lines
