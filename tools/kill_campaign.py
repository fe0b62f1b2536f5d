#!/usr/bin/env python
"""Kills small runs with SIGKILL at random moments, resumes them, and compares them with uninterrupted runs.

    python tools/kill_campaign.py --kills 60 --seed 0 --json

Each run trains a tiny model on generated text, with a checkpoint every 3 updates: in one process, or on two ranks of
one host under FSDP2 or DeepSpeed ZeRO. A kill ends all processes at once: at the start, in an update, or in a save.
After every kill all checkpoints must be intact, and the run must resume. At the end, its metrics and final tensors must
equal those of an uninterrupted run bit by bit. If not, the exit code is 1.

Runs are forked from this process, which has imported everything, so that a kill costs about two seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sltrain_dist.checkpoint.contents import damage
from sltrain_dist.checkpoint.manifest import list_checkpoints
from sltrain_dist.data.tokenizer import train_tokenizer
from sltrain_dist.streams import replace_unprintable
from tests.support.runs import (
    Corpus,
    documents,
    final_tensors,
    free_port,
    last_step,
    tiny_config,
    trajectory,
    write_config,
    write_shard,
)

ENGINES = {"single": ("ddp", 1), "fsdp": ("fsdp", 2), "zero": ("zero", 2)}
"""`parallel.engine` and number of ranks."""
MOMENTS = ("start", "update", "save")
EVERY = 3
TIMEOUT_S = 300.0
"""Longest time to wait for a run, which only a hanging run reaches."""


@dataclass
class Result:
    """The results of the runs of one engine."""

    kills: int = 0
    by_moment: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    runs: int = 0
    """Number of runs that finished."""
    equal: int = 0
    """Number of finished runs whose metrics and final tensors equal the uninterrupted run's bit by bit."""
    problems: list[str] = field(default_factory=list)


class Ranks:
    """The forked processes of one start of a run, each the leader of its own process group."""

    def __init__(self, engine: str, config: Path, run_dir: Path) -> None:
        name, self._count = ENGINES[engine]
        self._log = run_dir.with_suffix(".log")
        overrides = [f"run_dir={run_dir}", f"parallel.engine={name}"]
        rendezvous = {"WORLD_SIZE": str(self._count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._pids: list[int] = []
        for rank in range(self._count):
            pid = os.fork()
            if pid == 0:
                self._train(config, overrides, rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            with suppress(ProcessLookupError):
                os.setpgid(pid, pid)
            self._pids.append(pid)
        self._codes: dict[int, int] = {}

    def _train(self, config: Path, overrides: list[str], environment: dict[str, str]) -> None:
        """Trains in a forked process, and exits."""
        code = 1
        try:
            os.setpgid(0, 0)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if self._count > 1:
                os.environ.update(environment)
            from sltrain_dist.train.run import pretrain

            code = int(pretrain(str(config), overrides))
        finally:
            os._exit(code)

    def ended(self) -> bool:
        """Returns whether all processes have ended."""
        for pid in self._pids:
            if pid not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self._codes) == self._count

    def wait(self) -> list[int]:
        """Waits for the end of all processes and returns the exit codes by rank."""
        end = time.monotonic() + TIMEOUT_S
        while not self.ended():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"the run hangs; see {self._log}")
            time.sleep(0.005)
        return [self._codes[pid] for pid in self._pids]

    def kill(self) -> None:
        """Sends SIGKILL to all ranks and their workers, and waits until all have ended."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in self._pids:
            if pid not in self._codes:
                self._codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        while any(_alive(pid) for pid in self._pids):
            time.sleep(0.002)


def _alive(group: int) -> bool:
    """Returns whether a process of the group is running, that is, exists and is not a zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                return True
    return False


def campaign(engine: str, kills: int, rng: random.Random, config: Path, directory: Path, steps: int) -> Result:
    """Kills runs of an engine `kills` times, and lets the last run finish."""
    result = Result()
    reference = directory / f"{engine}-whole"
    began = time.monotonic()
    ranks = Ranks(engine, config, reference)
    while last_step(reference) < 1 and not ranks.ended():
        time.sleep(0.005)
    start_s = time.monotonic() - began
    if any(ranks.wait()):
        result.problems.append(f"the uninterrupted run failed; see {reference.with_suffix('.log')}")
        return result
    update_s = (time.monotonic() - began - start_s) / steps
    while not result.problems and (result.kills < kills or not result.runs):
        run_dir = directory / f"{engine}-{result.runs}"
        _kill_and_resume(engine, kills, rng, config, run_dir, (start_s, update_s), result)
        if not result.problems:
            result.runs += 1
            if difference := _compare(run_dir, reference):
                result.problems.append(difference)
            else:
                result.equal += 1
                shutil.rmtree(run_dir)
    return result


def _kill_and_resume(
    engine: str,
    kills: int,
    rng: random.Random,
    config: Path,
    run_dir: Path,
    seconds: tuple[float, float],
    result: Result,
) -> None:
    """Makes one run, which is killed and resumed until it finishes."""
    while True:
        ranks = Ranks(engine, config, run_dir)
        moment = rng.choice(MOMENTS)
        if result.kills < kills and _await(moment, rng, ranks, run_dir, *seconds):
            ranks.kill()
            result.kills += 1
            result.by_moment[moment] += 1
            for _, checkpoint in list_checkpoints(run_dir / "checkpoints"):
                if problem := damage(checkpoint):
                    result.problems.append(f"after kill {result.kills}: {problem}")
                    return
            continue
        if any(codes := ranks.wait()):
            result.problems.append(f"after kill {result.kills} the run ended with {codes}; see {run_dir}.log")
        return


def _await(moment: str, rng: random.Random, ranks: Ranks, run_dir: Path, start_s: float, update_s: float) -> bool:
    """Waits for a random moment of a kind; returns False if the run ends before it."""
    pause, target = rng.random(), last_step(run_dir) + rng.randint(1, 8)
    saves = run_dir / "checkpoints"
    if moment == "start":
        pause *= start_s
    else:
        pause *= update_s
        while not (last_step(run_dir) >= target if moment == "update" else any(saves.glob(".incomplete-*"))):
            if ranks.ended():
                return False
            time.sleep(0.001)
    time.sleep(pause)
    return not ranks.ended()


def _compare(run_dir: Path, reference: Path) -> str | None:
    """Returns a description of the first difference between two runs, or None."""
    got, want = trajectory(run_dir), trajectory(reference)
    if len(got) != len(want):
        return f"{run_dir} has {len(got)} lines of metrics instead of {len(want)}"
    for line, other in zip(got, want, strict=True):
        if line != other:
            return f"{run_dir} differs: {line} instead of {other}"
    return None if final_tensors(run_dir) == final_tensors(reference) else f"{run_dir} has different final tensors"


def prepare(directory: Path, steps: int) -> Path:
    """Makes text, tokenizer and configuration of the runs; returns the configuration file."""
    for shard in range(3):
        write_shard(directory / f"c4-train.{shard:05d}-of-00003.json.gz", documents(f"train-{shard}", 60))
    write_shard(directory / "c4-validation.00000-of-00001.json.gz", documents("validation", 21))
    train_tokenizer(documents("tokenizer", 200), directory / "tokenizer.model", vocab_size=300)
    corpus = Corpus(
        str(directory / "c4-train.*.json.gz"),
        str(directory / "c4-validation.*.json.gz"),
        directory / "tokenizer.model",
    )
    values = tiny_config(
        corpus, train={"steps": steps, "micro_batch": 2}, eval={"every": 10}, checkpoint={"every": EVERY, "keep": 2}
    )
    return write_config(directory / "config.yaml", values)


def main() -> int:
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="number of kills over all engines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--steps", type=int, default=40, help="number of updates in a run")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    arguments = parser.parse_args()

    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    import sltrain_dist.train.loop  # noqa: F401 (imported once, for all runs)

    if "zero" in arguments.engines:
        import deepspeed  # noqa: F401

    began = time.monotonic()
    results: dict[str, Result] = {}
    directory = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    config = prepare(directory, arguments.steps)
    for index, engine in enumerate(arguments.engines):
        share = (arguments.kills + index) // len(arguments.engines)
        rng = random.Random(f"{arguments.seed}:{engine}")
        results[engine] = campaign(engine, share, rng, config, directory, arguments.steps)
        if not arguments.json:
            print(f"{engine}: {asdict(results[engine])}", flush=True)
    good = all(not result.problems for result in results.values())
    if good:
        shutil.rmtree(directory)  # otherwise it is kept for inspection
    if arguments.json:
        report = {
            "seed": arguments.seed,
            "kills": sum(result.kills for result in results.values()),
            "all_equal": good,
            "seconds": round(time.monotonic() - began),
            "engines": {engine: asdict(result) for engine, result in results.items()},
        }
        print(json.dumps(report))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
