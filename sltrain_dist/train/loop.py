"""The training loop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.config.load import to_yaml
from sltrain_dist.data.loader import merge_states
from sltrain_dist.errors import DivergedError, ExitCode
from sltrain_dist.models.count import model_flops_per_token
from sltrain_dist.optim.restarts import last_restart, learning_rate_share, restart_is_due, states_cleared_at
from sltrain_dist.optim.schedule import learning_rate
from sltrain_dist.parallel.whole_layers import restart
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.stop import StopAgreed
from sltrain_dist.tracking.meters import Throughput, mfu, peak_flops, peak_memory_bytes
from sltrain_dist.train.build import Run, restore
from sltrain_dist.train.divergence import check_finite, check_savable, count_spike, find_spike, not_learning, remember
from sltrain_dist.train.evaluate import evaluate
from sltrain_dist.train.observers.observer import Update
from sltrain_dist.train.run_directory import Outcome
from sltrain_dist.train.state import rng_state
from sltrain_dist.train.step import forward_backward


@dataclass
class Clock:
    """Times and step counters of the run, and the throughput since the last log line."""

    before_s: float
    meter: Throughput = field(default_factory=Throughput)
    started: float = field(default_factory=time.monotonic)
    logged_step: int = 0
    saved_step: int = 0
    """Step of the newest checkpoint; 0: none."""
    evaluated_step: int | None = None
    """Step of the last evaluation, if known."""
    updates: int = 0
    """Updates by this process, including the current one."""
    restart_s: float = 0.0
    """Seconds of restarts since the last log line."""

    @property
    def elapsed_s(self) -> float:
        """Seconds spent on the run, including before it was resumed."""
        return self.before_s + time.monotonic() - self.started


def fit(run: Run) -> Outcome:
    """Trains until the budget is used up or a stop is requested, with evaluations and checkpoints.

    Raises:
        DivergedError: The loss, the gradient norm, or a tensor to be saved is not finite.
        DataError: The data cannot be read, or too much of it is unusable.
        StorageError: A checkpoint cannot be written.
    """
    state = run.state
    clock = Clock(state.elapsed_s, logged_step=state.step, saved_step=state.step)
    if state.step:
        clock.evaluated_step = _evaluated_step(run)
    if state.finished(run.config.train) and not _evaluation_is_due(run, clock):
        return Outcome(ExitCode.DONE, f"nothing left to do: all {state.step} updates are already made", state.step)
    try:
        _train(run, clock)
    except StopAgreed as stop:
        _save(run, clock)
        run.stop.acknowledge()
        return Outcome(ExitCode.STOPPED_EARLY, f"stopped early with everything saved: {stop}", state.step)
    run.stop.acknowledge()
    return Outcome(ExitCode.DONE, "done", state.step)


def _train(run: Run, clock: Clock) -> None:
    """Trains until the budget is used up. Saves before each evaluation, so that a stop can interrupt the latter."""
    while True:
        finished = run.state.finished(run.config.train)
        checkpoint, step = run.config.checkpoint, run.state.step
        if finished or _due(checkpoint.every, step) or _due(checkpoint.keep_every, step):
            _save(run, clock)
        if _evaluation_is_due(run, clock):
            _evaluate(run, clock)
        if finished:
            return
        watchdog.beat("waiting for training data")
        with clock.meter.waiting_for_data():
            run.row_prefetcher.wait(run.stop.reason)
        _check_stop(run)
        _update(run, clock)


def _update(run: Run, clock: Clock) -> None:
    config, state, engine = run.config, run.state, run.engine
    with clock.meter.waiting_for_data():
        rows, on_device = run.row_prefetcher.take()
    clock.updates += 1
    step = state.step + 1
    if restart_is_due(config.reparam, state.step):
        _restart(run, clock)
    lr = learning_rate(config.optim, state.progress(config.train, config.optim.warmup_steps))
    lr *= learning_rate_share(config.reparam, state.step)
    last = config.train.steps is not None and step >= config.train.steps
    update = Update(clock.updates, step, lr, last)
    with ExitStack() as watching:
        for observer in run.observers:
            watching.enter_context(observer.updating(engine, update))
        engine.begin_update(lr, state.grad_norm)
        update.loss, update.tokens = forward_backward(
            engine,
            rows,
            config.train.micro_batch,
            run.env,
            reset_attention=config.data.reset_attention,
            sent=on_device,
            meanwhile=partial(_prepare_next, run, clock),
        )
        for observer in run.observers:
            observer.backward_done(engine, update)
        update.grad_norm = engine.clip_gradients()
        spike = find_spike(state.spikes, update.loss, update.grad_norm, config.train)
        if spike is None:
            check_finite(update.loss, update.grad_norm, state.step, run.run_dir.checkpoints, config.optim)
            engine.update()
        else:
            engine.discard()
    watchdog.warmed_up()
    if spike is None:
        run.rows, run.loss, state.grad_norm = rows, update.loss, update.grad_norm
        state.first_loss = update.loss if state.first_loss is None else state.first_loss
        remember(state.spikes, update.loss, update.grad_norm, step, config.train)
    elif _answer_spike(run, clock, spike):
        return
    state.advance(update.tokens, config.optim.warmup_steps)
    for observer in run.observers:
        observer.updated(engine, update, run.tracker)
    clock.meter.add(update.tokens)
    run.tracker.progress(state.step, state.tokens, update.loss)
    if _due(config.tracking.log_every, state.step) or state.finished(config.train):
        _log(run, clock, loss=update.loss, lr=lr, grad_norm=update.grad_norm)


def _answer_spike(run: Run, clock: Clock, spike: str) -> bool:
    """Counts and reports a spike, and goes back to a checkpoint if the configuration says so and there is one.

    Returns:
        Whether the run has gone back. If not, the update is skipped.

    Raises:
        DivergedError: There are too many spikes, or one has been made part of the weights.
    """
    config, state = run.config, run.state
    step = state.step + 1
    count_spike(state.spikes, spike, step, config.train)
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    path = None
    if config.train.spike == "rewind":  # not to a checkpoint of a stop, so that a run that was stopped goes back as far
        path = run.store.newest(run.tracker.warn, lambda saved: _due(every, saved) or _due(keep_every, saved))
    what = f"update {step} is a spike, number {state.spikes.total} of the run: {spike}"
    if path is None:
        if config.optim.update == "per_layer":
            raise DivergedError(f"{what}; it was made layer by layer, and there is no checkpoint to go back to yet")
        run.tracker.warn(f"{what}; it is skipped")
        return False
    _go_back(run, clock, path)
    run.tracker.warn(f"{what}; the run goes back to {path}, and on with the data behind it")
    return True


def _go_back(run: Run, clock: Clock, path: Path) -> None:
    """Sets model, optimizer and counters to those of a checkpoint of this run; the place in the data stays."""
    state, spikes, reader = run.state, run.state.spikes, CheckpointReader(path)
    run.engine.load(reader.read, reader.step, partial(states_cleared_at, run.config.reparam, step=reader.step))
    vars(state).update(vars(restore(reader, run.env)))
    state.spikes = replace(state.spikes, total=spikes.total, in_row=spikes.in_row, furthest=spikes.furthest)
    run.tracker.go_back(state.step)
    clock.evaluated_step = _evaluated_step(run)
    clock.logged_step = clock.saved_step = state.step


def _restart(run: Run, clock: Clock) -> None:
    """Makes a restart, and reports how long the slowest rank took."""
    started = time.monotonic()
    reparam = run.config.reparam
    restart(run.engine, run.config, run.env, run.state.step // reparam.restart_every)
    if run.env.device.type == "cuda":
        torch.cuda.synchronize(run.env.device)
    (seconds,) = run.env.max([time.monotonic() - started])
    clock.restart_s += seconds
    what = "merged" if reparam.method == "relora" else "factored anew"
    run.tracker.note(f"restart after update {run.state.step}: low-rank products {what} in {seconds:.2f} s")


def _prepare_next(run: Run, clock: Clock) -> None:
    """Prefetches the rows of the next update while the device computes."""
    if run.state.step + 1 != run.config.train.steps:  # the last update has no successor
        watchdog.beat("getting the next update's rows")
        with clock.meter.waiting_for_data():
            run.row_prefetcher.prepare(run.stop.reason)
        watchdog.beat("in a forward and backward pass")


def _log(run: Run, clock: Clock, **values: float) -> None:
    window, state = clock.meter.window(), run.state
    # Utilization includes padding, which the device computes too.
    slots = (state.step - clock.logged_step) * run.config.train.global_batch * run.config.data.seq_len
    clock.logged_step = state.step
    utilisation = mfu(
        slots / window.elapsed_s, model_flops_per_token(run.config.model, run.config.data.seq_len), _peak_flops(run)
    )
    # The rank that waits longest and the rank with the highest peak determine the run.
    data_wait_s, peak_bytes = run.env.max([window.data_wait_s, peak_memory_bytes()])
    run.tracker.train(
        {
            "step": state.step,
            **values,
            "tokens": state.tokens,
            "tokens_per_s": window.tokens_per_s,
            "data_wait_s": data_wait_s,
            "peak_memory_bytes": int(peak_bytes),
            "elapsed_s": clock.elapsed_s,
            **({"mfu": utilisation} if utilisation is not None else {}),
            **_restarts(run, clock),
            **({} if run.config.train.spike == "off" else {"spikes": state.spikes.total}),
            **{name: value for observer in run.observers for name, value in observer.values().items()},
            **_data_faults(run),
        }
    )


def _restarts(run: Run, clock: Clock) -> dict[str, float]:
    """Returns the number of restarts so far and the seconds of those since the last line, if the run makes any."""
    reparam, seconds = run.config.reparam, clock.restart_s
    clock.restart_s = 0.0
    if reparam.restart_every == 0:
        return {}
    return {"restarts": last_restart(reparam, run.state.step) // reparam.restart_every, "restart_s": seconds}


def _peak_flops(run: Run) -> float | None:
    """Returns the peak FLOP/s of all devices together, if it is known."""
    if run.env.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(run.env.device))
    per_device = peak and (peak.fp32 if run.config.train.precision.product == "float32" else peak.bf16)
    return run.env.world_size * per_device if per_device else None


def _data_faults(run: Run) -> dict[str, int]:
    """Returns the non-zero counts of unusable documents and retried reads so far, by cause, over all ranks."""
    stats = run.loader.stats
    counts = {f"bad_documents_{cause}": count for cause, count in stats.bad.items()}
    counts |= {f"data_retries_{cause}": count for cause, count in stats.retries.items()}
    totals = run.env.sum([float(count) for count in counts.values()])
    return {name: int(total) for name, total in zip(counts, totals, strict=True) if total}


def _evaluation_is_due(run: Run, clock: Clock) -> bool:
    """Whether to evaluate at this step, unless that is done; after a restart, the evaluation may be missing."""
    step = run.state.step
    scheduled = step == 0 or run.state.finished(run.config.train) or _due(run.config.eval.every, step)
    return run.eval_rows is not None and scheduled and clock.evaluated_step != step


def _evaluated_step(run: Run) -> int | None:
    """Returns the current step if metrics.jsonl has its evaluation, as after a restart; else None."""
    step = run.state.step
    return step if run.env.on_main(lambda: run.tracker.has_evaluation(step)) else None


def _evaluate(run: Run, clock: Clock) -> None:
    assert run.eval_rows is not None
    with clock.meter.excluded():
        result = evaluate(
            run.engine,
            run.eval_rows,
            run.config.eval_micro_batch,
            run.env,
            reset_attention=run.config.data.reset_attention,
            before_batch=partial(_check_stop, run),
        )
        if run.samples is not None:
            texts = run.samples.continued(run.engine, run.env, before_pass=partial(_check_stop, run))
            run.tracker.samples(run.state.step, texts)
    clock.evaluated_step = run.state.step
    run.perplexities.append((run.state.step, result.perplexity))
    run.tracker.evaluation(
        {
            "step": run.state.step,
            "eval_loss": result.loss,
            "eval_perplexity": result.perplexity,
            "eval_tokens": result.tokens,
        }
    )


def _save(run: Run, clock: Clock) -> None:
    """Saves a checkpoint, unless the one of this step exists."""
    env, state = run.env, run.state
    if clock.saved_step == state.step:
        return
    with clock.meter.excluded():
        check_savable(run.engine, run.rows, run.config, env, state.step)
        run.tracker.sync()
        state.elapsed_s = clock.elapsed_s
        path = run.store.save(
            state.step,
            run.engine.saved_ranges(),
            {
                "counters": state.to_dict(),
                "data": merge_states(env.gather(run.row_prefetcher.state_dict())),
                "rng": env.gather(rng_state(env.device)),
                "supports": run.supports,
                "code": run.code,
            },
            to_yaml(run.config),
            run.tokenizer,
            warn=run.tracker.warn,
        )
    clock.saved_step = state.step
    run.tracker.note(f"saved {path}")
    if warning := not_learning(run.loss, state, run.config):
        run.tracker.warn(warning)


def _check_stop(run: Run) -> None:
    """Raises StopAgreed on all ranks if any has a stop request, because a signal may reach only one of them."""
    reason = run.stop.reason()
    (num_requests,) = run.env.sum([1.0 if reason else 0.0])  # cheap; texts are gathered only if needed
    if num_requests:
        raise StopAgreed(next(text for text in run.env.gather(reason) if text))


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
