"""`train.dry_run`: builds everything, makes one update on random data, and reports the peak memory."""

from __future__ import annotations

import time

import numpy as np

from sltrain_dist.config.rules import micro_batches_per_update
from sltrain_dist.config.schema import Config
from sltrain_dist.data.stream.rows import mark_first_tokens
from sltrain_dist.errors import ExitCode
from sltrain_dist.numerics.splitmix import integers, key64
from sltrain_dist.parallel.whole_layers import restart
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.tracking.console import format_bytes
from sltrain_dist.tracking.meters import peak_memory_bytes
from sltrain_dist.train.build import open_initial, predict, prepare_corpus, start_engine
from sltrain_dist.train.observers.memory_watch import MemoryWatch
from sltrain_dist.train.run_directory import Outcome
from sltrain_dist.train.step import Rows, forward_backward


def dry_run(config: Config, env: Environment) -> Outcome:
    """Makes one full-sized update without reading documents or writing a checkpoint, and a restart if the run has any.

    Sources and tokenizer are resolved and `checkpoint.init_from` is verified, so that wrong paths are found too.
    """

    def say(line: str) -> None:
        if env.is_main:
            print(line, flush=True)

    passes = micro_batches_per_update(config, env.world_size)
    corpus = prepare_corpus(config, env, say, with_evaluation=False)
    say(f"data: {corpus.num_shards} shards, tokenizer {corpus.tokenizer}")
    open_initial(config, env, corpus.tokenizer, say)
    for what, value in MemoryWatch(config, env, predict).summary():
        say(f"{what}: {value}")
    engine = start_engine(config, env)
    rows = made_up_rows(config, env.rank, passes * config.train.micro_batch)
    engine.begin_update(config.optim.lr, None)
    reset = config.data.reset_attention
    loss, tokens = forward_backward(engine, rows, config.train.micro_batch, env, reset_attention=reset)
    norm = engine.clip_gradients()
    engine.update()
    if config.reparam.restart_every:
        started = time.monotonic()
        restart(engine, config, env)
        say(f"a restart: {env.max([time.monotonic() - started])[0]:.2f} s")
    # Only now do the optimizer states exist, with which the next forward and backward pass must fit in memory.
    engine.begin_update(config.optim.lr, norm)
    forward_backward(engine, rows, config.train.micro_batch, env, reset_attention=reset)
    (peak,) = env.max([peak_memory_bytes()])
    say(f"one update on {tokens} made-up tokens: loss {loss:.3f}, gradient norm {norm:.3f}")
    kind = "allocated on the device" if env.device.type == "cuda" else "resident, with libraries"
    say(f"peak memory ({kind}), largest of {env.world_size} ranks: {format_bytes(peak)}")
    return Outcome(ExitCode.DONE, f"dry run: peak memory {int(peak)} bytes", 0)


def made_up_rows(config: Config, rank: int, rows: int) -> Rows:
    """Returns full rows of uniform random token ids; each has two documents with `data.reset_attention`."""
    count = rows * (config.data.seq_len + 1)
    ids = integers(key64(config.seed, f"dry-run-rank-{rank}"), 0, count, config.model.vocab_size)
    made = ids.astype(np.int32).reshape(rows, -1)
    if config.data.reset_attention:
        mark_first_tokens(made, np.s_[:, [0, made.shape[1] // 2]])
    return made
