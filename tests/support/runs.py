"""Tiny runs: their text, their configuration, and starting them in this process or in others."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from sltrain_dist.checkpoint.manifest import list_checkpoints
from sltrain_dist.numerics.splitmix import integers, key64
from sltrain_dist.train.run import pretrain
from tests.support.paths import REPO

LAUNCH = REPO / "launch" / "pretrain.py"
_SYLLABLES = [a + b for a, b in zip("bcdfghjklmnprstvwxyz", "aeiouaeiouaeiouaeiou", strict=True)]
TIMEOUT_S = 240.0
"""Longer than any of these runs could take on a busy machine; only a hang gets there."""


@dataclass(frozen=True)
class Corpus:
    """Made-up text on disk."""

    train: str
    """Glob of three shards."""
    validation: str
    tokenizer: Path


def words(key: int, count: int) -> str:
    """Words of two syllables. Some are far more frequent than others, so that there is something to learn."""
    draws = integers(key, 0, 4 * count, len(_SYLLABLES)).reshape(4, count).tolist()
    return " ".join(_SYLLABLES[min(a, b)] + _SYLLABLES[min(c, d)] for a, b, c, d in zip(*draws, strict=True))


def documents(name: str, count: int) -> list[str]:
    """Documents of 2 to 24 words, so that rows are padded very unevenly."""
    return [words(key64(number, name), 2 + number * 7 % 23) for number in range(count)]


def write_shard(path: Path, texts: Iterable[str], extra: bytes = b"") -> None:
    """One gzipped shard in C4's format, ending with some raw lines."""
    lines = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"} for text in texts]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode() + extra
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0))


def tiny_config(corpus: Corpus, **sections: dict[str, Any]) -> dict[str, Any]:
    """Values of a run that takes about a second; `sections` win."""
    values: dict[str, Any] = {
        "seed": 3,
        "model": {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_layers": 2,
            "num_heads": 4,
        },
        "reparam": {"rank": 6, "density": 0.1, "alpha": 12.0},
        "data": {
            "source": corpus.train,
            "tokenizer": str(corpus.tokenizer),
            "seq_len": 24,
            "streams": 4,
            "shuffle_block": 16,
            "workers": 0,
        },
        "optim": {"lr": 0.01, "clip": 0.5, "warmup_steps": 2},
        "train": {"steps": 6, "micro_batch": 4, "global_batch": 8, "dtype": "fp32"},
        "eval": {"source": corpus.validation, "every": 3},
        "checkpoint": {"every": 2},
        "tracking": {"log_every": 1, "mlflow": False, "progress": "lines"},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if name in values else section
    return values


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Writes values as a configuration file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def train_here(config: Path, run_dir: Path, *overrides: str) -> int:
    """Runs in this process; returns the exit code."""
    return int(pretrain(str(config), [f"run_dir={run_dir}", *overrides]))


class Process:
    """A launched command, with its output in files. What is left of it is killed at the end of the block."""

    def __init__(self, command: Sequence[str | Path], out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self._stdout, self._stderr = out.with_suffix(".out"), out.with_suffix(".err")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait(self) -> int:
        """Waits for its end and returns the exit code."""
        return self._process.wait(TIMEOUT_S)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process that was launched, and to no child of it."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to all that was launched, and waits until all are gone. A launcher's ranks outlive it otherwise."""
        pids = [self._process.pid, *_descendants(self._process.pid)]
        for pid in pids:  # the launcher first: it has no time left to tell its ranks anything
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(TIMEOUT_S)
        end = time.monotonic() + TIMEOUT_S
        while any(_runs(pid) for pid in pids):
            assert time.monotonic() < end, f"{pids} survived SIGKILL"
            time.sleep(0.01)

    def send_to(self, child: int, number: signal.Signals) -> None:
        """Sends a signal to one of its children alone."""
        assert child in self.children()
        os.kill(child, number)

    def children(self) -> list[int]:
        """Process ids of its children: a launcher's are the ranks."""
        return _children(self._process.pid)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for a condition, as long as the process lives."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self._process.poll() is None, f"it ended before {what}:\n{self.stdout[-2000:]}{self.stderr[-4000:]}"
            assert time.monotonic() < end, f"{what} did not happen within {TIMEOUT_S:g} s"
            time.sleep(0.003)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def _descendants(pid: int) -> list[int]:
    return [each for child in _children(pid) for each in (child, *_descendants(child))]


def _runs(pid: int) -> bool:
    """Whether a process is there and is not only waiting for its parent to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def python(config: Path, run_dir: Path, *overrides: str) -> Process:
    """launch/pretrain.py under plain python."""
    return Process([sys.executable, LAUNCH, *_arguments(config, run_dir, overrides)], run_dir.parent / run_dir.name)


def torchrun(config: Path, run_dir: Path, *overrides: str, ranks: int = 2) -> Process:
    """launch/pretrain.py under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return Process([*launcher, LAUNCH, *_arguments(config, run_dir, overrides)], run_dir.parent / run_dir.name)


def deepspeed(config: Path, run_dir: Path, *overrides: str) -> Process:
    """launch/pretrain.py under DeepSpeed's launcher, on two ranks."""
    port = free_port()  # its own choice is always 29500, where another run may be
    # An empty place for extensions that DeepSpeed compiles, of which it must compile none.
    nothing_built = ["env", f"TORCH_EXTENSIONS_DIR={run_dir.parent / 'extensions'}"]
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", "2", "--master_port", str(port)]
    return Process(
        [*nothing_built, *launcher, LAUNCH, *_arguments(config, run_dir, overrides)], run_dir.parent / run_dir.name
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments(config: Path, run_dir: Path, overrides: Sequence[str]) -> list[str]:
    return ["--config", str(config), f"run_dir={run_dir}", *overrides]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, parsed."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def trajectory(run_dir: Path) -> list[dict[str, float]]:
    """What of metrics.jsonl is mathematics, line by line: everything but speed and memory."""
    kept = ("step", "loss", "lr", "grad_norm", "tokens", "eval_loss", "eval_perplexity", "eval_tokens")
    return [{key: line[key] for key in kept if key in line} for line in metrics(run_dir)]


def last_step(run_dir: Path) -> int:
    """The newest update in metrics.jsonl."""
    return max((line["step"] for line in metrics(run_dir)), default=0)


def saved_steps(run_dir: Path) -> list[int]:
    """The updates of the complete checkpoints."""
    return [step for step, _ in list_checkpoints(run_dir / "checkpoints")]


def outcome(run_dir: Path) -> dict[str, Any]:
    """What exit.json says about the run's end: code, reason and step."""
    values: dict[str, Any] = json.loads((run_dir / "exit.json").read_text())
    assert time.strptime(values["time"], "%Y-%m-%dT%H:%M:%S%z")
    return {key: values[key] for key in ("code", "reason", "step")}


def final_tensors(run_dir: Path) -> dict[str, bytes]:
    """All weights and optimizer states of the newest checkpoint, bit by bit, whatever ranks wrote them."""
    pieces: dict[str, dict[int, bytes]] = {}
    for path in list_checkpoints(run_dir / "checkpoints")[-1][1].glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, _, start = key.rpartition("@")
                pieces.setdefault(name, {})[int(start)] = file.get_tensor(key).tobytes()
    return {name: b"".join(parts[start] for start in sorted(parts)) for name, parts in pieces.items()}


def kill_after_a_checkpoint(process: Process, run_dir: Path, step: int) -> None:
    """Kills a run, with all its ranks, a few updates after the checkpoint of `step`."""
    process.until(lambda: step in saved_steps(run_dir), f"the checkpoint of step {step}")
    process.until(lambda: last_step(run_dir) >= step + 4, f"step {step + 4}")
    process.kill()
    assert last_step(run_dir) > max(saved_steps(run_dir)), "killed at a checkpoint, so that nothing was lost"
