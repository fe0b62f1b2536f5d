#!/usr/bin/env python
"""Trains small models on real text and compares supports by validation perplexity, with its spread over seeds.

    python tools/compare_supports.py --text wiki.json.gz --out runs/supports --supports random blocks lowrank

Supports: random, stratified, blocks, or blocks:ORDER with another permutation of its inputs (grouped, strided,
natural); lowrank is the model without S, and full the model without S and factors. A finished run is one JSON file
in --out and is not repeated, so that an interrupted study can be continued. A seed determines the initial values,
the support and the order of documents; the held-out documents are the same for all.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import io
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.json import JSON
from rich.table import Table
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config, SupportKind
from sltrain_dist.errors import ConfigError, DataError, DivergedError, SltrainError
from sltrain_dist.files import write_whole
from sltrain_dist.models.build import build_model, sparse_layers
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.numerics.splitmix import key64, permutation
from sltrain_dist.optim.schedule import Progress, learning_rate
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.sparse_lowrank.supports.blocks import BlockSupport, Order
from sltrain_dist.streams import replace_unprintable
from sltrain_dist.train.evaluate import evaluate
from sltrain_dist.train.step import Rows, forward_backward

HELD_OUT_EVERY = 50  # every 50th document is used for validation
WARMUP_SHARE = 0.05  # warm-up as a share of the updates
WITHOUT_S = ("lowrank", "full")
ORDERS: dict[str, Order] = {f"blocks:{order}": order for order in get_args(Order)}


@dataclass(frozen=True)
class Case:
    """The settings that differ between the runs of a study."""

    support: str
    density: float
    lr: float
    seed: int


def option(default: float, meaning: str) -> Any:
    """Returns a field of :class:`Study` that is also a command-line option."""
    return field(default=default, metadata={"help": f"{meaning}; default: {default}"})


@dataclass(frozen=True)
class Study:
    """The settings that all runs of a study share."""

    files: tuple[str, ...]
    tokenizer: str
    vocab: int = option(4096, "vocabulary of the tokenizer that is trained without --tokenizer")
    layers: int = option(4, "decoder layers")
    hidden: int = option(256, "width of the residual stream")
    intermediate: int = option(768, "width of the MLP")
    heads: int = option(4, "attention heads")
    rank: int = option(64, "r")
    scale: float = option(0.25, "alpha / r")
    seq: int = option(256, "tokens in a sequence")
    batch: int = option(16, "sequences in an update")
    clip: float = option(1.0, "largest gradient norm; 0 for no clipping")
    tokens: int = option(4_000_000, "training tokens of each run")
    valid_tokens: int = option(200_000, "validation tokens")
    autocast: bool = option(False, "compute in bfloat16, with parameters in float32")

    @property
    def updates(self) -> int:
        """Number of updates in each run."""
        return max(1, self.tokens // (self.batch * self.seq))

    def config(self, case: Case) -> Config:
        """Returns the configuration of one run; raises ConfigError if it cannot be run."""
        known = (*get_args(SupportKind), *ORDERS, *WITHOUT_S)
        if case.support not in known:
            raise ConfigError(f"--supports {case.support}: unknown; choose from {', '.join(known)}")
        reparam = {"rank": self.rank, "alpha": self.scale * self.rank, "method": case.support}
        if case.support not in WITHOUT_S:
            reparam |= {"method": "sltrain", "support": case.support.partition(":")[0], "density": case.density}
        sections: dict[str, Any] = {
            "model": {"vocab_size": self.vocab, "num_layers": self.layers, "num_heads": self.heads}
            | {"hidden_size": self.hidden, "intermediate_size": self.intermediate},
            "reparam": reparam,
            "data": {"seq_len": self.seq, "batching": "pack"},
            "optim": {"lr": case.lr, "clip": self.clip, "warmup_steps": math.ceil(WARMUP_SHARE * self.updates)},
            "train": {"steps": self.updates, "micro_batch": self.batch, "global_batch": self.batch, "dtype": "fp32"},
        }
        return build_config({"seed": case.seed, **sections})


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


def train_tokenizer(files: Sequence[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-pair tokenizer on the training documents."""
    lines = (line for text in split_documents(files)[0] for line in text.splitlines() if line)
    model = io.BytesIO()
    options: dict[str, Any] = {"model_type": "bpe", "byte_fallback": True, "num_threads": 1, "minloglevel": 2}
    options |= {"vocab_size": vocab_size, "input_sentence_size": 50_000}
    try:
        SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    except RuntimeError as error:  # too little text for so many pieces
        raise ConfigError(f"--vocab {vocab_size}: {error}") from None
    path.write_bytes(model.getvalue())


def pack(texts: Iterable[str], tokenizer: SentencePieceProcessor, rows: int, seq_len: int) -> Rows:
    """Packs documents, each followed by the end-of-document token, into at most `rows` rows (rows, seq_len + 1)."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eos_id()]
        if len(ids) > rows * seq_len:
            break
    starts = np.arange(min(rows, (len(ids) - 1) // seq_len)) * seq_len
    return np.asarray(ids, dtype=np.int32)[starts[:, None] + np.arange(seq_len + 1)]


def load_rows(study: Study, seed: int) -> tuple[Rows, Rows]:
    """Returns (training, validation) rows of one run; raises DataError if there is too little text."""
    tokenizer = SentencePieceProcessor(model_file=study.tokenizer)
    texts, held_out = split_documents(study.files)
    order = permutation(key64(seed, "data order"), len(texts))
    wanted = study.updates * study.batch
    train = pack((texts[i] for i in order), tokenizer, wanted, study.seq)
    valid = pack(held_out, tokenizer, max(1, study.valid_tokens // study.seq), study.seq)
    if len(train) < wanted or not len(valid):
        counts = f"{len(train)} of {wanted} training sequences and {len(valid)} validation sequences"
        raise DataError(f"the text is only enough for {counts}; add files to --text, or lower --tokens")
    return train, valid


def make_model(study: Study, case: Case) -> LlamaForCausalLM:
    """Builds the model of one run, with the permutations of its case."""
    model = build_model(study.config(case))
    for _, layer in sparse_layers(model):
        if case.support in ORDERS and isinstance(layer.support, BlockSupport):
            layer.support.order = ORDERS[case.support]
            layer.support.reset()
    forward = torch.autocast("cpu", torch.bfloat16, enabled=study.autocast)(model.forward)
    model.forward = forward  # type: ignore[method-assign]
    return model


def train(study: Study, threads: int, case: Case) -> dict[str, Any]:
    """Makes one run and returns its result; raises DivergedError if the loss is not finite."""
    torch.set_num_threads(threads)
    config, model = study.config(case), make_model(study, case)
    train_rows, valid_rows = load_rows(study, case.seed)
    env = Environment(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    engine = DDPEngine(model, config.optim, env)
    warmup, started = config.optim.warmup_steps, time.perf_counter()
    for step, rows in enumerate(np.split(train_rows, study.updates)):
        warmup_done = warmup / study.updates if step >= warmup else 0.0
        engine.begin_update(learning_rate(config.optim, Progress(step, step / study.updates, warmup_done)), None)
        loss, _ = forward_backward(engine, rows, study.batch, env)
        if not math.isfinite(loss):
            raise DivergedError(f"{case}: the loss is {loss} at update {step + 1}; lower --lrs")
        engine.clip_gradients()
        engine.update()
        if (step + 1) % max(1, study.updates // 20) == 0:
            where = f"{case.support}, seed {case.seed}: update {step + 1}/{study.updates}"
            print(f"{where}, loss {loss:.3f}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    rate = study.updates * study.batch * study.seq / (time.perf_counter() - started)
    layers = [layer for _, layer in sparse_layers(model)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return asdict(case) | {
        "density": sum(layer.support.nnz for layer in layers) / max(1, weights),  # the actual density of S
        "perplexity": evaluate(engine, valid_rows, study.batch, env).perplexity,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_s": rate,
    }


def run(study: Study, threads: int, out: Path, case: Case) -> dict[str, Any]:
    """Returns the result of one run: from its file if it exists for the same settings, else from a new run."""
    texts = [(Path(file).name, Path(file).stat().st_size) for file in study.files]
    settings = asdict(study) | {"files": texts, "tokenizer": sha256(Path(study.tokenizer).read_bytes()).hexdigest()}
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    path = out / f"{case.support.replace(':', '_')}-{case.density:g}-{case.lr:g}-{case.seed}-{digest}.json"
    if not path.exists():
        record = {"result": train(study, threads, case), "study": settings}
        write_whole(path, json.dumps(record, indent=1))
    return dict(json.loads(path.read_text())["result"])


def summarise(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each support, density and learning rate: means over the seeds, and their number."""
    groups: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["support"], result["density"], result["lr"]), []).append(result)
    rows = []
    for group in groups.values():
        mean = {name: statistics.fmean(result[name] for result in group) for name in ("perplexity", "tokens_per_s")}
        perplexities = [result["perplexity"] for result in group]
        rows.append(group[0] | mean | {"min": min(perplexities), "max": max(perplexities), "seeds": len(group)})
        del rows[-1]["seed"]
    return rows


def make_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Makes a table of the rows of :func:`summarise`."""
    table = Table(title="Validation perplexity over the seeds", box=SIMPLE_HEAD)
    for heading in ("support", "S", "lr", "mean", "min–max", "seeds", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "support" else "right", no_wrap=True)
    for row in rows:
        cells = "{support} {density:.2%} {lr:g} {perplexity:.2f} {min:.2f}–{max:.2f} {seeds} {tokens_per_s:,.0f}"
        table.add_row(*cells.format(**row).split())
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", required=True, nargs="+", metavar="GLOB", help="C4-format *.json.gz files")
    add("--out", required=True, type=Path, metavar="DIR", help="directory of finished runs")
    add("--tokenizer", metavar="FILE", help="SentencePiece model; default: trained on the text, kept in --out")
    add("--supports", nargs="+", default=["random", "stratified", "blocks"])
    add("--densities", nargs="+", type=float, default=[0.03])
    add("--lrs", nargs="+", type=float, default=[3e-3], help="peak learning rates")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    for each in fields(Study)[2:]:
        kind = {"action": "store_true"} if each.default is False else {"type": type(each.default), "metavar": "N"}
        add(f"--{each.name.replace('_', '-')}", default=each.default, help=each.metadata["help"], **kind)
    add("--threads", type=int, default=1, help="number of torch threads in each run")
    add("--jobs", type=int, default=1, help="number of runs in parallel")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def make_study(args: argparse.Namespace) -> Study:
    """Makes the study of the command line, and its tokenizer if none is given."""
    if not (files := sorted(file for pattern in args.text for file in glob.glob(pattern))):  # noqa: PTH207
        raise DataError(f"no file matches --text {' '.join(args.text)}")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Path(args.tokenizer or args.out / f"bpe-{args.vocab}.model")
    if not args.tokenizer and not tokenizer.exists():
        train_tokenizer(files, args.vocab, tokenizer)
    args.vocab = SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    return Study(tuple(files), str(tokenizer), *(getattr(args, each.name) for each in fields(Study)[2:]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the missing runs, seed by seed, and prints the table; returns the exit code."""
    replace_unprintable()
    args = parse(arguments)
    try:
        study = make_study(args)
        grid = itertools.product(args.seeds, args.lrs, args.densities, args.supports)
        # Without S there is no density, and one run is enough.
        cases = list(dict.fromkeys(Case(s, 0.0 if s in WITHOUT_S else d, lr, seed) for seed, lr, d, s in grid))
        for case in cases:
            study.config(case)  # finds invalid cases before hours of runs
        work = partial(run, study, args.threads, args.out)
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = summarise((pool.map if args.jobs > 1 else map)(work, cases))
    except SltrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    Console().print(JSON.from_data(rows) if args.json else make_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
