"""What `launch/pretrain.py` and `sltrain train` call: from a configuration to an exit code.

torch is imported only once the configuration has been checked, so that a wrong one is told at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sltrain_dist.checkpoint.manifest import list_checkpoints
from sltrain_dist.config.load import load_config, run_dir_of
from sltrain_dist.config.rules import check_ranks, check_trainable
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError, ExitCode, SltrainError
from sltrain_dist.runtime import watchdog
from sltrain_dist.runtime.malloc import keep_freed_memory
from sltrain_dist.runtime.rank_variables import rank_variables
from sltrain_dist.runtime.stop import StopRequest
from sltrain_dist.train.exit import Outcome, claim, directory, release, write_failed_start, write_outcome

if TYPE_CHECKING:
    from sltrain_dist.runtime.environment import Environment
    from sltrain_dist.tracking.mlflow import Status

_CLEANUP_S = 15.0
"""How long a failed process among several may take to end: the file system or a tracking server may be what is lost."""


def pretrain(config_path: str, overrides: Sequence[str] = ()) -> ExitCode:
    """Trains as configured and says in `run_dir/exit.json` how it ended.

    Args:
        config_path: YAML file.
        overrides: `section.key=value` strings.

    Returns:
        The exit code of a single process. One of several ends here, with that code, see :func:`_leave`.
    """
    joined: list[Path] = []  # the run directory, once this process has joined the run in it
    details = ""
    # How the run ended is written first, and cleaning up, which can take a while, comes after.
    with ExitStack() as cleanup:
        try:
            outcome = _run(config_path, overrides, joined, cleanup)
        except SltrainError as error:
            outcome = _failure(joined, error.exit_code, str(error))
        except KeyboardInterrupt:
            outcome = _failure(joined, ExitCode.UNEXPECTED, "interrupted; nothing was saved since the last checkpoint")
        except Exception as error:
            code, reason = _explain(error)
            outcome = _failure(joined, code, reason)
            details = traceback.format_exc() if code is ExitCode.UNEXPECTED else ""
        if _failed(outcome):
            watchdog.hurry(_CLEANUP_S)
        _say(joined, config_path, overrides, outcome, details)
    if _one_of_several():
        _leave(outcome)
    if "torch" in sys.modules:  # without it, no process group has been started
        from sltrain_dist.runtime import environment

        environment.stop()
    return outcome.code


def print_run_dir(config_path: str, overrides: Sequence[str] = ()) -> ExitCode:
    """Prints the directory of exit.json: for batch scripts, before they start anything."""
    try:
        print(directory(load_config(config_path, overrides)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return ExitCode.DONE


def _leave(outcome: Outcome) -> NoReturn:
    """Ends one of several processes, without the interpreter's own way of ending.

    After a failure that way would wait for peers that are not coming. After a good end it runs into threads that
    communication libraries leave behind: now and then one of them brings the process down with SIGABRT, and with it
    a run that has done all it should.
    """
    if not _failed(outcome):
        from sltrain_dist.runtime import environment

        try:
            environment.meet()  # rank 0 holds the store that the others may still need
            environment.stop()
        except Exception as error:
            print(f"the run has ended well, but another process of it has not: {error}", file=sys.stderr)
        watchdog.stop()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a closed terminal takes nothing any more
            stream.flush()
    os._exit(int(outcome.code))


def _run(config_path: str, overrides: Sequence[str], joined: list[Path], cleanup: ExitStack) -> Outcome:
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
    # Before anything that the ranks could do differently.
    check_agreement(env, run_identity(config))
    run_dir = directory(config)
    env.on_main(lambda: claim(run_dir))
    joined.append(run_dir)
    watchdog.report_to(lambda reason: _write_failure(joined, reason))
    cleanup.callback(release, run_dir)
    if config.train.dry_run:
        from sltrain_dist.train.dry_run import dry_run

        return dry_run(config, env)
    return _train(config, env, run_dir, cleanup)


def _train(config: Config, env: Environment, run_dir: Path, cleanup: ExitStack) -> Outcome:
    # Here, because a wrong configuration should not wait for these to be imported.
    from sltrain_dist.tracking.console import log_line
    from sltrain_dist.tracking.tracker import LOG
    from sltrain_dist.train.build import build_run
    from sltrain_dist.train.loop import fit
    from sltrain_dist.train.summary import closing_lines

    stop = StopRequest(run_dir)
    stop.install()
    cleanup.callback(stop.restore)

    def say(line: str) -> None:
        if env.is_main:
            _print(line)
            log_line(run_dir / LOG, line)

    run = build_run(config, env, run_dir, stop, say)
    status: Status = "FAILED"
    cleanup.callback(lambda: run.tracker.close(status))
    cleanup.callback(run.loader.close)
    outcome = fit(run)
    status = "FINISHED" if outcome.code is ExitCode.DONE else "KILLED"
    for line in closing_lines(config, run_dir, outcome, run.perplexities):
        run.tracker.note(line)
    return outcome


def _print(line: str) -> None:
    """Prints a line of progress before the tracker exists, unless its reader is gone."""
    with suppress(OSError):
        print(line, flush=True)


def _failure(joined: list[Path], code: ExitCode, reason: str) -> Outcome:
    kept = list_checkpoints(joined[0] / "checkpoints") if joined else []
    return Outcome(code, reason, kept[-1][0] if kept else 0)


def _failed(outcome: Outcome) -> bool:
    return outcome.code not in (ExitCode.DONE, ExitCode.STOPPED_EARLY)


def _say(joined: list[Path], config_path: str, overrides: Sequence[str], outcome: Outcome, details: str) -> None:
    """Writes exit.json, and an error to standard error: once where all ranks have found the same."""
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    said: str | None = None
    try:
        if not joined:
            named = run_dir_of(config_path, overrides)
            if named is not None and is_main:
                write_failed_start(Path(named), outcome)
            said = None if is_main else outcome.reason
        elif _failed(outcome) or is_main:
            said = write_outcome(joined[0], outcome)
    except OSError as error:
        print(f"error: exit.json could not be written: {error}", file=sys.stderr, flush=True)
    if _failed(outcome) and said != outcome.reason:
        if said is None:  # a rank that another one's end has brought down has nothing to explain
            print(details, end="", file=sys.stderr)
        print(f"error: {outcome.reason}", file=sys.stderr, flush=True)


def _write_failure(joined: list[Path], reason: str) -> None:
    write_outcome(joined[0], _failure(joined, ExitCode.UNEXPECTED, reason))


def _one_of_several() -> bool:
    world_size = os.environ.get("WORLD_SIZE", "1")  # set under srun too, once there is a group
    return world_size.isdigit() and int(world_size) > 1


def _explain(error: Exception) -> tuple[ExitCode, str]:
    """(exit code, reason) of an exception that is none of ours."""
    advice = out_of_memory(error)
    if advice is not None:
        return ExitCode.CONFIG, advice
    from sltrain_dist.runtime.environment import lost_peer

    return ExitCode.UNEXPECTED, lost_peer(error) or f"{type(error).__name__}: {error}"


def out_of_memory(error: Exception) -> str | None:
    """What to change, if `error` says that a GPU or this machine has no memory left; None if it is another error."""
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
        "train.global_batch as it is, or spread the states over more ranks with parallel.engine=zero; "
        "`sltrain plan --search` looks for settings that fit, train.dry_run=true tries them out"
    )


if __name__ == "__main__":
    print(
        "error: this module only holds what starts a run; use `sltrain train --config FILE`, "
        "`python -m sltrain_dist train --config FILE`, or launch/pretrain.py",
        file=sys.stderr,
    )
    sys.exit(int(ExitCode.CONFIG))
