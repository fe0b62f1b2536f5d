"""The composition root, which builds all parts of a run, in an order that reads from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sltrain_dist.checkpoint.initial_weights import check_tokenizer, weights_for
from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.checkpoint.store import CheckpointStore, undamaged_checkpoint
from sltrain_dist.config.differences import flatten
from sltrain_dist.config.rules import micro_batches_per_update, without_effect
from sltrain_dist.config.run_files import INITIAL_WEIGHTS
from sltrain_dist.config.schema import Config
from sltrain_dist.data.evaluation import evaluation_rows
from sltrain_dist.data.loader import TrainLoader
from sltrain_dist.data.prepare.make_corpus import build_embedded
from sltrain_dist.data.sources.resolve import resolve_source
from sltrain_dist.data.sources.retry import Fetcher, RetryPolicy
from sltrain_dist.data.sources.token_shards import count_shards
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.errors import CheckpointError, ConfigError
from sltrain_dist.inference.samples import SamplePrompts
from sltrain_dist.memory.estimate import estimate
from sltrain_dist.memory.result import Estimate
from sltrain_dist.models.build import build_meta_model, build_model, initial_values, supports_fingerprint
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.optim.projected.settings import optimizer_settings
from sltrain_dist.optim.restarts import states_cleared_at
from sltrain_dist.parallel.checkpointing import prepare_layers
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.fsdp import FSDPEngine
from sltrain_dist.parallel.pieces import ReadRange
from sltrain_dist.parallel.zero import ZeroEngine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.runtime.stop import StopRequest
from sltrain_dist.tracking.tracker import RunTracker
from sltrain_dist.train.agreement import check_agreement, code_version
from sltrain_dist.train.device_rows import RowPrefetcher
from sltrain_dist.train.observers.memory_watch import MemoryWatch
from sltrain_dist.train.observers.observer import Observer
from sltrain_dist.train.observers.sanity_checks import SanityChecks
from sltrain_dist.train.observers.traffic_watch import TrafficWatch
from sltrain_dist.train.run_directory import RunDirectory
from sltrain_dist.train.state import (
    TrainState,
    check_resumable,
    check_schedule,
    check_weights_fit,
    read_saved,
    restore_rng,
)
from sltrain_dist.train.step import Rows
from sltrain_dist.train.summary import summarise


@dataclass(frozen=True)
class ResolvedData:
    """The resolved data of a run: training shards, evaluation rows and tokenizer file."""

    train_shards: list[str]
    source_sizes: list[int]
    """Number of shards of each source if sources are mixed by weight; otherwise empty."""
    eval_rows: Rows | None
    tokenizer: Path

    @property
    def num_shards(self) -> int:
        """Number of training shards; for token shards, the number of text shards that they were made from."""
        return count_shards(self.train_shards)


@dataclass(kw_only=True)
class Run:
    """All parts of a run that is ready to train."""

    config: Config
    env: Environment
    run_dir: RunDirectory
    engine: Engine
    state: TrainState
    loader: TrainLoader
    eval_rows: Rows | None
    tokenizer: Path
    store: CheckpointStore
    tracker: RunTracker
    stop: StopRequest
    supports: str
    samples: SamplePrompts | None
    observers: Sequence[Observer]
    rows: Rows | None = None
    """This rank's rows of the last update; None before the first."""
    loss: float = math.nan
    """Loss of the last update."""
    perplexities: list[tuple[int, float]] = field(default_factory=list)
    """(step, perplexity) of the evaluations by this process."""

    def __post_init__(self) -> None:
        self.code = code_version()  # not when a checkpoint is saved: the files may have changed by then
        self.row_prefetcher = RowPrefetcher(self.loader, self.env.device)


def build_run(
    config: Config, env: Environment, run_dir: RunDirectory, stop: StopRequest, say: Callable[[str], None]
) -> Run:
    """Builds a run, and resumes it from a checkpoint if the configuration requests it and there is one.

    Args:
        config: The configuration.
        env: The distributed environment.
        run_dir: The run directory, claimed for this run.
        stop: Records requests to stop.
        say: Prints a line of progress on the main rank, before the tracker exists.

    Raises:
        SltrainError: The run cannot be built. Raised on all ranks, or only on the rank that found the error.
    """
    micro_batches_per_update(config, env.world_size)
    corpus = prepare_corpus(config, env, say)
    samples = SamplePrompts(config, corpus.tokenizer) if config.eval.samples and corpus.eval_rows is not None else None
    store = CheckpointStore(run_dir.checkpoints, env, config.checkpoint.keep, config.checkpoint.keep_every)
    store.recover(say)
    reader = open_checkpoint(config, env, store, say)
    source = reader or open_initial(config, env, corpus.tokenizer, say)
    notes: list[str] = []
    if source is not None:
        config = config.with_supports_of(source.config())
    if reader is not None:
        notes = _check_settings(reader, config)
        if config.checkpoint.init_from is not None:
            say(f"checkpoint.init_from = {config.checkpoint.init_from} is ignored, because the run resumes")

    say("building the model and its supports" + ("" if source is None else f", to be loaded from {source.path}"))
    if source is None:
        engine = start_engine(config, env)
    else:
        with weights_for(config, source, env, run_dir.path / INITIAL_WEIGHTS, say) as read:
            engine = start_engine(config, env, read, 0 if reader is None else reader.step)
    supports = supports_fingerprint(engine.module)
    state = TrainState() if reader is None else restore(reader, env)
    if source is not None and source.config().reparam.method == config.reparam.method:
        source.check_supports(supports)
    abandoned = store.abandon_after(state.step)
    loader = TrainLoader(
        config.data,
        shards=corpus.train_shards,
        tokenizer_path=corpus.tokenizer,
        seed=config.seed,
        global_batch=config.train.global_batch,
        rank=env.rank,
        world_size=env.world_size,
        source_sizes=corpus.source_sizes,
        state=None if reader is None else reader.state["data"],
        # A rank with a stuck worker must report it before the collectives of the others time out.
        timeout_s=config.parallel.timeout_s * (1.0 if env.world_size == 1 else 0.9),
    )
    check_agreement(env, {"supports": supports, **loader.order})
    tracker = RunTracker(
        config.tracking,
        run_dir.path,
        config_flat=flatten(config.model_dump()),
        total_steps=config.train.steps,
        total_tokens=config.train.tokens,
        is_main=env.is_main,
        resumed_step=state.step,
        with_samples=samples is not None,
    )
    env.on_main(lambda: run_dir.write_config(config))
    memory = MemoryWatch(config, env, predict)
    tracker.summary({**summarise(config, env, run_dir.path, corpus.num_shards, state.step), "Memory": memory.summary()})
    for warning in without_effect(config):
        tracker.warn(warning)
    if config.parallel.engine != "ddp" and env.world_size == 1:
        engine_name = f"parallel.engine={config.parallel.engine}"
        tracker.warn(f"{engine_name} on one rank shards nothing, and takes more memory than parallel.engine=ddp")
    if reader is not None:
        tracker.note(f"resumed from {reader.path} at update {state.step}")
        for note in notes:
            tracker.note(f"changed since then: {note}")
    for path in abandoned:
        tracker.note(
            f"the run goes back to update {state.step}; a later checkpoint is kept as {path}, and can be deleted"
        )
    observers: list[Observer] = [memory, TrafficWatch(env)]
    if config.train.sanity_checks:
        observers.append(SanityChecks(env, supports))
    return Run(
        config=config,
        env=env,
        run_dir=run_dir,
        engine=engine,
        state=state,
        loader=loader,
        eval_rows=corpus.eval_rows,
        tokenizer=corpus.tokenizer,
        store=store,
        tracker=tracker,
        stop=stop,
        supports=supports,
        samples=samples,
        observers=observers,
    )


def predict(config: Config, ranks: int) -> Estimate:
    """Predicts the memory of a run on a number of ranks."""
    return estimate(config, ranks=ranks)


def start_engine(config: Config, env: Environment, read: ReadRange | None = None, step: int = 0) -> Engine:
    """Builds the model in its engine, without allocating more on a rank than it keeps.

    Values are then set in place: to what `read` returns, or to the initial values, which are bitwise those of
    :func:`build_model` on any number of ranks.

    Args:
        config: The configuration.
        env: The distributed environment.
        read: Reads parameters, and optimizer states if `step` is not 0; None for initial values.
        step: Number of updates that the run has made.
    """
    if read is None and config.parallel.engine == "ddp":
        return build_engine(build_model(config, env.device), config, env)
    model = build_meta_model(config)
    read = read or initial_values(model)
    engine = build_engine(model, config, env)
    engine.load(read, step, partial(states_cleared_at, config.reparam, step=step))
    return engine


def build_engine(model: LlamaForCausalLM, config: Config, env: Environment) -> Engine:
    """Wraps the model in the configured engine. The values of a model on the meta device must be loaded afterwards.

    Activation checkpointing is applied to the decoder layers first, then compilation, then sharding, each around the
    former.
    """
    prepare_layers(model, config.train)
    if config.parallel.engine == "zero":
        return ZeroEngine(model, config, env)
    if config.parallel.engine == "fsdp":
        return FSDPEngine(model, config, env)
    return DDPEngine(model, optimizer_settings(config), env)


def prepare_corpus(
    config: Config, env: Environment, say: Callable[[str], None], *, with_evaluation: bool = True
) -> ResolvedData:
    """Resolves data sources and tokenizer; builds the embedded corpus if it is used and does not exist yet."""
    data, evaluation = config.data, config.eval
    train_source, eval_source, tokenizer_path = data.source, evaluation.source, data.tokenizer
    if "embedded" in (train_source, eval_source, tokenizer_path):
        cache = None if data.cache_dir is None else Path(data.cache_dir)
        vocab_size = config.model.vocab_size if tokenizer_path == "embedded" else None
        corpus = env.on_main(lambda: build_embedded(cache, vocab_size, report=say))
        split = {"train": corpus.train_glob, "validation": corpus.validation_glob}
        for name, source, chosen in (("data", train_source, data.split), ("eval", eval_source, evaluation.split)):
            if source == "embedded" and chosen not in split:
                raise ConfigError(f"{name}.split = {chosen!r}: the embedded corpus has the splits train and validation")
        train_source = split[data.split] if train_source == "embedded" else train_source
        eval_source = split[evaluation.split] if eval_source == "embedded" else eval_source
        tokenizer_path = str(corpus.tokenizer) if tokenizer_path == "embedded" else tokenizer_path
    tokenizer = Tokenizer(Path(tokenizer_path))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} pieces of "
            f"{tokenizer_path}; set model.vocab_size={tokenizer.vocab_size} or more"
        )
    fetcher = Fetcher(RetryPolicy.of(data), report=say)
    # With weights, each entry is a separate source, and data.source is a list.
    sources = [train_source] if data.weights is None else list(train_source)
    resolved = env.on_main(
        lambda: [
            resolve_source(each, subset=data.subset, split=data.split, fetcher=fetcher, report=say) for each in sources
        ]
    )
    shards = [shard for each in resolved for shard in each]
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise ConfigError(f"{twice} is in two entries of data.source, which have separate weights; remove it from one")
    eval_rows = None
    if eval_source is not None and with_evaluation:
        eval_shards = env.on_main(
            lambda: resolve_source(
                eval_source,
                subset=evaluation.subset,
                split=evaluation.split,
                key="eval.source",
                fetcher=fetcher,
                report=say,
            )
        )
        say(f"reading the evaluation data, up to eval.tokens = {evaluation.tokens:,} tokens")
        eval_rows = env.on_main(lambda: evaluation_rows(evaluation, data, eval_shards, tokenizer))
    source_sizes = [] if data.weights is None else [len(each) for each in resolved]
    return ResolvedData(shards, source_sizes, eval_rows, Path(tokenizer_path))


def open_checkpoint(
    config: Config, env: Environment, store: CheckpointStore, say: Callable[[str], None]
) -> CheckpointReader | None:
    """Verifies and opens the checkpoint that `checkpoint.resume` selects; None to start from scratch."""
    resume = config.checkpoint.resume
    if resume == "auto":
        path = store.newest(say)
    elif resume == "never":
        if store.newest(say) is not None:
            raise CheckpointError(
                f"checkpoint.resume=never, but {config.run_dir} has checkpoints; use another run_dir, or resume=auto"
            )
        path = None
    else:
        path = _named_checkpoint(Path(resume), env, store, say)
    return None if path is None else CheckpointReader(path)


def _named_checkpoint(path: Path, env: Environment, store: CheckpointStore, say: Callable[[str], None]) -> Path:
    if not store.holds(path):
        own = store.newest(say)
        if own is not None:  # the command was restarted, for example after a requeue
            say(f"resuming from the run's own checkpoint {own}, not from {path}")
            return own
    return undamaged_checkpoint("checkpoint.resume", path, env, say)


def _check_settings(reader: CheckpointReader, config: Config) -> list[str]:
    """Checks that a run can go on from a checkpoint, and returns a line for every changed setting."""
    before, where = reader.config(), str(reader.path)
    notes = check_resumable(before, config, where)
    check_schedule(before, config, read_saved(reader.state, reader.step, where).counters, where)
    return notes


def open_initial(
    config: Config, env: Environment, tokenizer: Path, say: Callable[[str], None]
) -> CheckpointReader | None:
    """Verifies and opens the checkpoint that `checkpoint.init_from` names; None if it names none.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        ConfigError: Its weights, or its tokenizer, are not those of this configuration.
    """
    if config.checkpoint.init_from is None:
        return None
    reader = CheckpointReader(undamaged_checkpoint("checkpoint.init_from", Path(config.checkpoint.init_from), env, say))
    differences = check_weights_fit(reader.config(), config, str(reader.path))
    env.on_main(lambda: check_tokenizer(reader.path, tokenizer))
    say(f"weights to start from: {reader.path}, after {reader.step} updates")
    for difference in differences:
        say(f"another setting than these weights had: {difference}")
    return reader


def restore(reader: CheckpointReader, env: Environment) -> TrainState:
    """Restores this process's random-number generators from a checkpoint, and returns its counters."""
    saved = read_saved(reader.state, reader.step, str(reader.path))
    if len(saved.rng) == env.world_size:
        restore_rng(saved.rng[env.rank], env.device)
    return saved.counters
