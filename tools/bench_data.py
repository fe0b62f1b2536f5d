#!/usr/bin/env python
"""Times the data pipeline: our streaming and prepared loaders, and `datasets` with a Hugging Face fast tokenizer.

    python tools/bench_data.py --input 'data/*.json.gz' --tokenizer t5.model --json

All of them make rows from the same text with the same (unigram) SentencePiece model. Tokens are counted without
padding. Seconds are processor time of all processes, including the start of a worker; repetitions take turns, and
medians are reported. Each repetition reads about `--megabytes` of text (prepared: `--epochs` times).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # all pipelines use one thread

import datasets
import numpy as np
import transformers
from benchmarking import positive, table

from sltrain_dist.config.schema import DataConfig
from sltrain_dist.data.documents import parse
from sltrain_dist.data.loader import TrainLoader
from sltrain_dist.data.prepare.tokens import prepare_tokens
from sltrain_dist.data.sources.resolve import read_documents, resolve_source
from sltrain_dist.data.stream.rows import count_tokens
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.streams import replace_unprintable

GLOBAL_BATCH = 64
PLAIN_BATCH = 1000
"""Number of documents that `datasets` maps together (its default)."""


class Cost(NamedTuple):
    """Tokens, time and memory of one repetition."""

    tokens: int
    cpu_s: float
    wall_s: float
    worker_bytes: int = 0
    """Peak resident memory of a worker."""


def make_shards(inputs: str, text_field: str, num_bytes: int, num_shards: int, directory: Path) -> list[str]:
    """Distributes the first `num_bytes` of usable text over shards of gzipped JSON lines; returns their paths."""
    paths = [directory / f"text.{number:05d}.json.gz" for number in range(num_shards)]
    size = count = 0
    with ExitStack() as stack:
        files = [stack.enter_context(gzip.open(path, "wb", compresslevel=6)) for path in paths]
        for _, line in chain.from_iterable(read_documents(shard, text_field) for shard in resolve_source(inputs)):
            text = parse(line, text_field)
            if isinstance(text, str):
                files[count % num_shards].write(json.dumps({"text": text}).encode() + b"\n")
                size += len(text.encode())
                count += 1
            if size >= num_bytes:
                break
    if size < num_bytes:
        raise SystemExit(f"{inputs} has only {size / 1e6:.1f} MB of text; lower --megabytes")
    return [str(path) for path in paths]


def fast_tokenizer(model: Path, directory: Path) -> Any:
    """Converts a unigram SentencePiece model to the fast T5 tokenizer of transformers."""
    shutil.copy(model, directory / "spiece.model")
    return transformers.T5TokenizerFast.from_pretrained(directory, extra_ids=0, model_max_length=int(1e9))


def plain_rows(shards: list[str], tokenizer: Any, batching: str, seq_len: int) -> Iterator[np.ndarray]:
    """Yields the rows of the `datasets` pipeline as arrays of shape (rows, seq_len), with −1 for padding."""

    def pad(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch["text"], max_length=seq_len, truncation=True, padding="max_length"))

    def pack(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(batch["text"])["input_ids"]  # with the eos token
        joined = [token for document in ids for token in document]
        whole = len(joined) // seq_len * seq_len
        return {"input_ids": [joined[i : i + seq_len] for i in range(0, whole, seq_len)]}

    stream = datasets.load_dataset("json", data_files=shards, split="train", streaming=True).shuffle(
        seed=1, buffer_size=PLAIN_BATCH
    )
    function = pad if batching == "pad" else pack
    rows = stream.map(function, batched=True, batch_size=PLAIN_BATCH, remove_columns=["text"])
    for batch in rows.iter(GLOBAL_BATCH):
        ids = np.asarray(batch["input_ids"], dtype=np.int32)
        yield np.where(np.asarray(batch["attention_mask"]) == 0, -1, ids) if batching == "pad" else ids


def run_plain(shards: list[str], tokenizer: Any, batching: str, seq_len: int) -> Cost:
    """Runs one epoch of the `datasets` pipeline in this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = sum(int(np.count_nonzero(rows >= 0)) for rows in plain_rows(shards, tokenizer, batching, seq_len))
    return Cost(tokens, time.process_time() - cpu, time.perf_counter() - wall)


def run_ours(shards: list[str], tokenizer: Path, data: DataConfig, updates: int) -> Cost:
    """Runs some updates of our loader; with a worker, the time includes the start of its process."""
    children = _children_s()
    cpu, wall = time.process_time(), time.perf_counter()
    loader = TrainLoader(
        data, shards=shards, tokenizer_path=tokenizer, seed=1, global_batch=GLOBAL_BATCH, rank=0, world_size=1
    )
    tokens = sum(count_tokens(next(loader)) for _ in range(updates))
    wall = time.perf_counter() - wall
    worker_bytes = max((_peak_resident(pid) for pid in loader.worker_pids), default=0)
    loader.close()
    return Cost(tokens, time.process_time() - cpu + _children_s() - children, wall, worker_bytes)


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak_resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Runs all pipelines in turns and returns the report."""
    shards = make_shards(args.input, args.text_field, int(args.megabytes * 1e6), args.shards, directory)
    ours = Tokenizer(args.tokenizer)
    (directory / "hf").mkdir()
    fast = fast_tokenizer(args.tokenizer, directory / "hf")
    texts = [str(parse(line, "text")) for shard in shards for _, line in read_documents(shard, "text")]
    ours_ids, fast_ids = ours.encode(texts), fast(texts, add_special_tokens=False)["input_ids"]
    equal = sum(one.tolist() == other for one, other in zip(ours_ids, fast_ids, strict=True))
    start = time.process_time()
    manifest = prepare_tokens(shards, directory / "tokens", args.tokenizer)
    prepare_s = time.process_time() - start
    tokens = sum(shard.tokens for shard in manifest.shards)
    prepared = resolve_source(str(directory / "tokens"))
    report: dict[str, Any] = {
        "device": "cpu, 1 core a process", "load": os.getloadavg()[0], "seq_len": args.seq_len,
        "documents": len(texts), "text_mb": sum(len(text.encode()) for text in texts) / 1e6, "tokens": tokens,
        "documents_with_the_same_ids": equal / len(texts),
        "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
        "prepare_tokens_per_cpu_s": tokens / prepare_s, "batching": {},
    }  # fmt: skip
    for batching in ("pad", "pack"):
        rows = len(texts) if batching == "pad" else tokens // args.seq_len
        updates = max(1, rows // GLOBAL_BATCH)
        data = DataConfig(batching=batching, seq_len=args.seq_len, streams=args.shards, workers=0)
        with_worker = data.model_copy(update={"workers": 1})
        runs: dict[str, Callable[[], Cost]] = {
            "plain": lambda b=batching: run_plain(shards, fast, b, args.seq_len),
            "streaming": lambda d=data, n=updates: run_ours(shards, args.tokenizer, d, n),
            "streaming, worker": lambda d=with_worker, n=updates: run_ours(shards, args.tokenizer, d, n),
            "prepared": lambda d=data, n=updates: run_ours(prepared, args.tokenizer, d, n * args.epochs),
            "prepared, worker": lambda d=with_worker, n=updates: run_ours(prepared, args.tokenizer, d, n * args.epochs),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                costs[name].append(run())
        results = {name: summarise(repetitions) for name, repetitions in costs.items()}
        for result in results.values():
            result["ratio"] = result["tokens_per_cpu_s"] / results["plain"]["tokens_per_cpu_s"]
        report["batching"][batching] = results
    return report


def summarise(costs: list[Cost]) -> dict[str, float]:
    """Returns the medians of the repetitions."""
    result = {
        "tokens": costs[0].tokens,
        "tokens_per_cpu_s": statistics.median(cost.tokens / cost.cpu_s for cost in costs),
        "tokens_per_wall_s": statistics.median(cost.tokens / cost.wall_s for cost in costs),
    }
    if costs[0].worker_bytes:
        result["worker_peak_mb"] = max(cost.worker_bytes for cost in costs) / 1e6
    return result


def main() -> None:
    """Parses the arguments, measures and prints."""
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="JSON lines: a file, directory or glob")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a unigram SentencePiece model, such as T5's")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--megabytes", type=float, default=8, help="amount of text to read")
    parser.add_argument("--shards", type=positive, default=8, help="files to distribute the text over, one per stream")
    parser.add_argument("--seq-len", type=positive, default=256)
    parser.add_argument("--epochs", type=positive, default=20, help="number of times that the prepared shards are read")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as directory:
        datasets.config.HF_DATASETS_CACHE = Path(directory) / "cache"
        report = measure(args, Path(directory))
    if args.json:
        print(json.dumps(report, indent=1))
        return
    for batching, results in report["batching"].items():
        rows = [
            [
                name,
                f"{result['tokens_per_cpu_s'] / 1e6:.2f}",
                f"{result['tokens_per_wall_s'] / 1e6:.2f}",
                f"{result['ratio']:.1f}",
                f"{result['worker_peak_mb']:.0f}" if "worker_peak_mb" in result else "",
            ]
            for name, result in results.items()
        ]
        header = [batching, "million tokens per processor second", "per second", "ratio", "MB of a worker"]
        print(table(header, rows) + "\n")


if __name__ == "__main__":
    main()
