#!/usr/bin/env python
"""Trains 60M models of several methods side by side on real text, and compares their validation losses.

    python tools/gpu_quality.py --text wiki.json.gz --tokenizer t5.model --seconds 300 --out quality.jsonl

All runs see the same rows in the same order, so that after equally many updates they have trained on equally many
tokens. They are stopped after --seconds; their learning rate is constant after the warm-up, so that none is stopped
before its decay. The first line has the settings; then every evaluation is a line, written as soon as it is made. The
last line compares the losses after the last update at which all methods were evaluated. Every 50th document is held out
for the evaluations.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarking import positive
from sentencepiece import SentencePieceProcessor

from sltrain_dist.data.tokenizer import train_tokenizer
from sltrain_dist.errors import DataError, SltrainError
from sltrain_dist.streams import replace_unprintable

REPO = Path(__file__).resolve().parents[1]
METHODS = {
    "full": ["reparam.method=full"],
    "lowrank": ["reparam.method=lowrank"],
    "random": ["reparam.support=random"],
    "blocks": ["reparam.support=blocks"],
}
HELD_OUT_EVERY = 50
STOP_S = 30.0
"""Seconds before the end at which runs that are not finished are stopped: they save a checkpoint first."""
_POLL_S = 0.5
SETTINGS = [
    "preset=llama_60m", "parallel.engine=ddp", "data.batching=pack", "optim.schedule=constant", "optim.clip=1.0",
    "checkpoint.every=0", "tracking.mlflow=false", "tracking.progress=lines",
]  # fmt: skip
SIZES = ["train.micro_batch=64", "train.global_batch=128", "optim.warmup_steps=100", "eval.every=50",
         "eval.tokens=200000"]  # fmt: skip
REHEARSED = [
    "model.hidden_size=64", "model.intermediate_size=160", "model.num_layers=2", "model.num_heads=2", "reparam.rank=8",
    "data.seq_len=32", "data.workers=0", "data.streams=4", "train.micro_batch=8", "train.global_batch=8",
    "optim.warmup_steps=2", "eval.every=4", "eval.tokens=2000",
]  # fmt: skip
"""Sizes of a rehearsal."""


def split_documents(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns (training, held-out) texts of C4-format files: gzipped, with a JSON object with a `text` on each line."""
    texts: list[str] = []
    for file in files:
        try:
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                texts += [json.loads(line)["text"] for line in lines]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not gzipped JSON lines with a `text` each: {error!r}") from None
    return [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY], texts[::HELD_OUT_EVERY]


def write_texts(texts: Iterable[str], path: Path) -> Path:
    """Writes documents to a file, and returns it."""
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


class Run:
    """A training run of one method, in a process of its own.

    Args:
        method: Name of the method.
        overrides: Overrides of the configuration.
        directory: Directory of the run and of what it prints.
    """

    def __init__(self, method: str, overrides: list[str], directory: Path) -> None:
        self.method, self.losses = method, dict[int, float]()
        self._metrics, self._log = directory / method / "metrics.jsonl", directory / f"{method}.log"
        config = directory / f"{method}.yaml"
        config.write_text("{}\n")
        command = [sys.executable, str(REPO / "launch" / "pretrain.py"), "--config", str(config)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *overrides, *METHODS[method], f"run_dir={directory / method}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def evaluations(self) -> Iterator[dict[str, Any]]:
        """Yields the evaluations that have been made since the last call."""
        if not self._metrics.exists():
            return
        for line in self._metrics.read_text().splitlines(keepends=True):
            record = json.loads(line) if line.endswith("\n") else {}
            if "eval_loss" in record and record["step"] not in self.losses:
                self.losses[record["step"]] = float(record["eval_loss"])
                yield {"method": self.method, **record}

    def failure(self) -> str | None:
        """Returns the end of what the run printed if it has failed: neither ended (0) nor was stopped (75)."""
        if self.process.poll() in (None, 0, 75):
            return None
        return f"exit code {self.process.returncode}: {self._log.read_text(errors='replace')[-2000:]}"


def comparison(runs: Iterable[Run]) -> dict[str, Any] | None:
    """Returns the losses after the last update at which all methods were evaluated; None if there is none yet."""
    by_method = {run.method: run.losses for run in runs}
    common = set.intersection(*map(set, by_method.values())) - {0}
    if not common:
        return None
    step = max(common)
    return {"compared_at_step": step, "eval_loss": {method: losses[step] for method, losses in by_method.items()}}


def train_all(overrides: list[str], directory: Path, seconds: float, out: Any) -> int:
    """Makes the runs side by side, writes their lines, and returns the exit status."""
    end = time.monotonic() + seconds
    out.write(json.dumps({"settings": overrides, "methods": METHODS}) + "\n")
    runs = [Run(method, overrides, directory) for method in METHODS]

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    stopped = False
    try:
        while any(run.process.poll() is None for run in runs):
            if not stopped and time.monotonic() > end - STOP_S:
                stopped = True
                for run in runs:
                    run.process.send_signal(signal.SIGTERM)
            for run in runs:
                for line in run.evaluations():
                    write(line)
            time.sleep(_POLL_S)
    finally:  # this process may be ended by a signal
        for run in runs:
            run.process.kill()
            run.process.wait()
    for run in runs:
        for line in run.evaluations():
            write(line)
        if failure := run.failure():
            write({"method": run.method, "failed": failure})
    compared = comparison(runs)
    too_short = {"method": "all", "failed": "there was no time for an evaluation of every method; give more"}
    write(compared or too_short)
    return 1 if compared is None or any(run.failure() for run in runs) else 0


def main() -> int:
    """Trains and compares; returns the exit status."""
    replace_unprintable()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the runs, removes their files
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="C4-format *.json.gz files")
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model; default: trained on the text")
    parser.add_argument("--vocab", type=positive, default=8192, help="pieces of the tokenizer that is trained")
    parser.add_argument("--seconds", type=float, required=True, help="time for everything")
    parser.add_argument("--updates", type=positive, default=1_000_000, help="updates of each run, if it is not stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, help="file of JSON lines, to append to")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--rehearse", action="store_true", help="tiny models")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary, args.out.open("a") as out:
        directory = Path(temporary)
        try:
            training, held_out = split_documents(args.text)
            train = write_texts(training, directory / "train.json.gz")
            validation = write_texts(held_out, directory / "validation.json.gz")
            tokenizer = Path(args.tokenizer or directory / "tokenizer.model")
            if not args.tokenizer:
                train_tokenizer(training, tokenizer, vocab_size=args.vocab, model_type="bpe")
        except SltrainError as error:
            print(f"error: {error}", file=sys.stderr)
            return int(error.exit_code)
        pieces = SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
        sources = [f"data.source={train}", f"eval.source={validation}", f"data.tokenizer={tokenizer}"]
        sizes = [f"model.vocab_size={pieces}", *(REHEARSED if args.rehearse else SIZES)]
        overrides = [*SETTINGS, *sizes, *sources, f"seed={args.seed}", f"train.steps={args.updates}"]
        return train_all(overrides, directory, args.seconds - (time.monotonic() - start), out)


if __name__ == "__main__":
    sys.exit(main())
