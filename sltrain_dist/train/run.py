"""The entry point of `launch/pretrain.py` and `sltrain train`: runs a configuration and returns an exit code.

torch is imported only after the configuration has been checked, so that errors in it are reported at once.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sltrain_dist.config.load import load_config, run_dir_of
from sltrain_dist.config.rules import check_ranks, check_trainable
from sltrain_dist.config.run_files import LOG
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError, ExitCode, SltrainError
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.malloc import keep_freed_memory
from sltrain_dist.runtime.rank_variables import rank_variables
from sltrain_dist.runtime.stop import StopRequest
from sltrain_dist.train.run_directory import Outcome, RunDirectory

if TYPE_CHECKING:
    from sltrain_dist.runtime.environment import Environment
    from sltrain_dist.tracking.mlflow import Status

_CLEANUP_S = 15.0
"""Time limit for the end of a failed process of several, since the file system or a tracking server may be lost."""

_PATIENCE_S = 10.0
"""Time that the main rank has to report an error of the start, before another rank reports its own."""


def pretrain(config_path: str, overrides: Sequence[str] = ()) -> ExitCode:
    """Trains as configured, and records in `run_dir/exit.json` how the run ended.

    Args:
        config_path: YAML file.
        overrides: `section.key=value` strings.

    Returns:
        The exit code. If there are several processes, they exit here with that code; see :func:`_exit_process`.
    """
    run_dir: RunDirectory | None = None  # until this process has joined the run
    details = ""
    # exit.json is written before the cleanup, which can take a while.
    with ExitStack() as cleanup:
        try:
            config, env = _start(config_path, overrides)
            run_dir = _join(config, env, cleanup)
            outcome = _run(config, env, run_dir, cleanup)
        except SltrainError as error:
            outcome = _failure(run_dir, error.exit_code, str(error))
        except KeyboardInterrupt:
            outcome = _failure(run_dir, ExitCode.UNEXPECTED, "interrupted; nothing was saved since the last checkpoint")
        except Exception as error:
            code, reason = _explain(error)
            outcome = _failure(run_dir, code, reason)
            details = traceback.format_exc() if code is ExitCode.UNEXPECTED else ""
        if _failed(outcome):
            watchdog.hurry(_CLEANUP_S)
        _report(run_dir, config_path, overrides, outcome, details)
    if _has_peers():
        _exit_process(outcome)
    if "torch" in sys.modules:  # otherwise there is no process group
        from sltrain_dist.runtime import environment

        environment.stop()
    return outcome.code


def print_run_dir(config_path: str, overrides: Sequence[str] = ()) -> ExitCode:
    """Prints the directory of exit.json, for batch scripts that need it before they start the run."""
    try:
        print(RunDirectory.of(load_config(config_path, overrides)).path)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return ExitCode.DONE


def _exit_process(outcome: Outcome) -> NoReturn:
    """Ends one of several processes without the interpreter's regular shutdown.

    After a failure, the regular shutdown would wait for ranks that do not respond. After a success, threads of
    communication libraries occasionally abort it with SIGABRT, and a complete run would end with an error.
    """
    if not _failed(outcome):
        from sltrain_dist.runtime import environment

        try:
            environment.meet()  # rank 0 has the store, which other ranks may still need
            environment.stop()
        except Exception as error:
            print(f"this process has ended normally, but another one of the run has not: {error}", file=sys.stderr)
        watchdog.stop()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the terminal may be closed
            stream.flush()
    os._exit(int(outcome.code))


def _start(config_path: str, overrides: Sequence[str]) -> tuple[Config, Environment]:
    """Loads the configuration, and meets the other processes of the run, which must have the same one."""
    config = load_config(config_path, overrides)
    check_trainable(config)
    rank, world_size, local_rank = rank_variables()
    check_ranks(config, world_size)
    from sltrain_dist.runtime import environment
    from sltrain_dist.train.agreement import check_agreement, run_identity

    watchdog.start(rank, world_size, local_rank, config.parallel.timeout_s)
    if rank == 0 and world_size > 1:
        _print(f"waiting for {world_size} processes to meet, for up to {config.parallel.timeout_s} s")
    env = environment.start(config.parallel.timeout_s, need_group=config.parallel.engine != "ddp")
    if env.device.type == "cpu":
        keep_freed_memory()
    # Before anything that could differ between ranks.
    check_agreement(env, run_identity(config))
    return config, env


def _join(config: Config, env: Environment, cleanup: ExitStack) -> RunDirectory:
    """Returns the run directory, claimed for this run; from now on, exit.json gets the first failure of any rank."""
    run_dir = RunDirectory.of(config)
    cleanup.callback(run_dir.release)
    env.on_main(run_dir.claim)
    watchdog.report_to(lambda reason: run_dir.write_outcome(_failure(run_dir, ExitCode.UNEXPECTED, reason)))
    return run_dir


def _run(config: Config, env: Environment, run_dir: RunDirectory, cleanup: ExitStack) -> Outcome:
    # Imported here, so that errors in the configuration are reported before these slow imports.
    if config.train.dry_run:
        from sltrain_dist.train.dry_run import dry_run

        return dry_run(config, env)
    from sltrain_dist.tracking.console import log_line
    from sltrain_dist.train.build import build_run
    from sltrain_dist.train.loop import fit
    from sltrain_dist.train.summary import closing_lines

    stop = StopRequest(run_dir.path)
    stop.install()
    cleanup.callback(stop.restore)

    def say(line: str) -> None:
        if env.is_main:
            _print(line)
            log_line(run_dir.path / LOG, line)

    run = build_run(config, env, run_dir, stop, say)
    status: Status = "FAILED"
    cleanup.callback(lambda: run.tracker.close(status))
    cleanup.callback(run.loader.close)
    outcome = fit(run)
    status = "FINISHED" if outcome.code is ExitCode.DONE else "KILLED"
    for line in closing_lines(config, run_dir.path, outcome, run.perplexities):
        run.tracker.note(line)
    return outcome


def _print(line: str) -> None:
    """Prints a line of progress before the tracker exists, and ignores a closed output."""
    with suppress(OSError):
        print(line, flush=True)


def _failure(run_dir: RunDirectory | None, code: ExitCode, reason: str) -> Outcome:
    return Outcome(code, reason, 0 if run_dir is None else run_dir.newest_step())


def _failed(outcome: Outcome) -> bool:
    return outcome.code not in (ExitCode.DONE, ExitCode.STOPPED_EARLY)


def _report(
    run_dir: RunDirectory | None, config_path: str, overrides: Sequence[str], outcome: Outcome, details: str
) -> None:
    """Writes exit.json, and prints an error; if all ranks have the same error, only one of them prints it."""
    recorded: str | None = None
    try:
        if run_dir is None:
            named = run_dir_of(config_path, overrides)
            recorded = _report_failed_start(None if named is None else RunDirectory(Path(named)), outcome)
        elif _failed(outcome) or _is_main():
            recorded = run_dir.write_outcome(outcome)
    except OSError as error:
        print(f"error: exit.json could not be written: {error}", file=sys.stderr, flush=True)
    if _failed(outcome) and recorded != outcome.reason:
        if recorded is None:  # otherwise this failure is a consequence of another rank's
            print(details, end="", file=sys.stderr)
        print(f"error: {outcome.reason}", file=sys.stderr, flush=True)


def _report_failed_start(run_dir: RunDirectory | None, outcome: Outcome) -> str | None:
    """Writes exit.json before the ranks have met. Returns the reason in it if the main rank has written it.

    Usually all ranks have the same error, and the main rank reports it. The others wait for that: launchers end all
    ranks when they see the first of them end, and the main rank might not have come to its report yet.
    """
    if not _is_main():
        time.sleep(_PATIENCE_S)  # until then, the launcher has usually ended this process
        if run_dir is not None and run_dir.recorded_reason() == outcome.reason:
            return outcome.reason
    if run_dir is not None:
        run_dir.write_failed_start(outcome)
    return None


def _is_main() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _has_peers() -> bool:
    world_size = os.environ.get("WORLD_SIZE", "1")  # under srun it is set when the process group is created
    return world_size.isdigit() and int(world_size) > 1


def _explain(error: Exception) -> tuple[ExitCode, str]:
    """Returns (exit code, reason) for an exception other than SltrainError."""
    advice = out_of_memory(error)
    if advice is not None:
        return ExitCode.CONFIG, advice
    from sltrain_dist.runtime.environment import lost_peer

    return ExitCode.UNEXPECTED, lost_peer(error) or f"{type(error).__name__}: {error}"


def out_of_memory(error: Exception) -> str | None:
    """Says what to change if `error` means that a GPU or this machine is out of memory; None for other errors."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # The CPU's allocator, and libraries in C++, raise a plain RuntimeError.
    signs = ("DefaultCPUAllocator: ", "Cannot allocate memory", "std::bad_alloc")
    on_host = isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
    if not (on_device or on_host):
        return None
    what = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2] or type(error).__name__
    return (
        f"the {'device' if on_device else 'machine'} is out of memory ({what}); lower train.micro_batch, with "
        "train.global_batch unchanged, or shard the optimizer states over more ranks with parallel.engine=zero; "
        "`sltrain plan --search` finds settings that fit, train.dry_run=true tests them"
    )


if __name__ == "__main__":
    print(
        "error: this module is not a command; use `sltrain train --config FILE`, "
        "`python -m sltrain_dist train --config FILE`, or launch/pretrain.py",
        file=sys.stderr,
    )
    sys.exit(int(ExitCode.CONFIG))
