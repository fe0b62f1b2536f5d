"""What `launch/pretrain.py` calls: from a configuration to an exit code."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from sltrain_dist.checkpoint.manifest import list_checkpoints
from sltrain_dist.config.load import load_config, run_dir_of
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError, ExitCode, SltrainError
from sltrain_dist.parallel import environment
from sltrain_dist.parallel.environment import Environment
from sltrain_dist.tracking.mlflow import Status
from sltrain_dist.train.exit import Outcome, write_outcome, write_running


def pretrain(config_path: str, overrides: Sequence[str] = ()) -> ExitCode:
    """Trains as configured and says in `run_dir/exit.json` how it ended.

    Args:
        config_path: YAML file.
        overrides: `section.key=value` strings.

    Returns:
        The exit code. On a failure among several ranks the process ends here, with that code: leaving the
        interpreter in the usual way would wait for peers that are not coming.
    """
    started, run_dir = time.time(), None
    try:
        config = load_config(config_path, overrides)
        env = environment.start(config.parallel.timeout_s, need_group=config.parallel.engine == "zero")
        run_dir = env.on_main(lambda: _make_run_dir(config))
        outcome = _dry_run(config, env) if config.train.dry_run else _train(config, env, run_dir)
    except SltrainError as error:
        run_dir = run_dir or _existing(run_dir_of(config_path, overrides))
        return _failed(run_dir, error.exit_code, str(error), started)
    except KeyboardInterrupt:
        reason = "interrupted twice; nothing was saved since the last checkpoint"
        return _failed(run_dir, ExitCode.UNEXPECTED, reason, started)
    except Exception as error:
        traceback.print_exc()
        return _failed(run_dir, ExitCode.UNEXPECTED, f"{type(error).__name__}: {error}", started)
    if env.is_main:
        write_outcome(run_dir, outcome, started)
    environment.stop()
    return outcome.code


def _train(config: Config, env: Environment, run_dir: Path) -> Outcome:
    from sltrain_dist.train.build import build_run
    from sltrain_dist.train.loop import fit
    from sltrain_dist.train.summary import closing_lines

    run = build_run(config, env, run_dir, lambda line: print(line, flush=True) if env.is_main else None)
    status: Status = "FAILED"
    try:
        outcome = fit(run)
        status = "FINISHED" if outcome.code is ExitCode.DONE else "KILLED"
        for line in closing_lines(config, run_dir, outcome, run.perplexities):
            run.tracker.note(line)
        return outcome
    finally:
        run.loader.close()
        run.tracker.close(status)


def _dry_run(config: Config, env: Environment) -> Outcome:
    from sltrain_dist.train.dry_run import dry_run

    return dry_run(config, env)


def _make_run_dir(config: Config) -> Path:
    """Makes the run directory, and proves that it can be written to."""
    run_dir = Path(config.run_dir)
    if config.train.dry_run:
        run_dir = run_dir / "dry_run"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_running(run_dir)
    except OSError as error:
        raise ConfigError(f"run_dir = {run_dir} cannot be written to ({error.strerror}); choose another") from None
    return run_dir


def _existing(run_dir: str | None) -> Path | None:
    return Path(run_dir) if run_dir is not None and Path(run_dir).is_dir() else None


def _failed(run_dir: Path | None, code: ExitCode, reason: str, started: float) -> ExitCode:
    said = None
    if run_dir is not None:
        kept = list_checkpoints(run_dir / "checkpoints")
        try:
            said = write_outcome(run_dir, Outcome(code, reason, kept[-1][0] if kept else 0), started)
        except OSError as error:
            print(f"error: exit.json could not be written: {error}", file=sys.stderr, flush=True)
    # What all ranks found alike is printed once: by the first to write it, or by the main rank.
    if said != reason and (run_dir is not None or os.environ.get("RANK", "0") == "0"):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        os._exit(int(code))
    return code
